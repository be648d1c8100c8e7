// Vectors of texts by transformers.js: node encode.mjs FOLDER DTYPE < texts.json > vectors.json
import { readFileSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";
import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(folder);
const texts = JSON.parse(readFileSync(0, "utf8"));
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype });
const inputs = tokenizer(texts, { padding: true, truncation: true });
const { sentence_embedding } = await model(inputs);
process.stdout.write(JSON.stringify(sentence_embedding.tolist()));
