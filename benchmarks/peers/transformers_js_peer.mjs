// transformers.js, on an export to ONNX that pools and normalises by itself.
import { basename, dirname } from "node:path";
import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";
import { answer } from "./protocol.mjs";

await answer(async ({ model: folder, dtype, threads }) => {
  env.allowRemoteModels = false;
  env.localModelPath = dirname(folder);
  const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
  const session_options = { intraOpNumThreads: threads };
  const model = await AutoModel.from_pretrained(basename(folder), { dtype, session_options });
  const encode = async (texts, size) => {
    const order = texts.map((_, place) => place).sort((a, b) => texts[b].length - texts[a].length);
    const vectors = new Array(texts.length);
    for (let start = 0; start < order.length; start += size) {
      const places = order.slice(start, start + size);
      const inputs = tokenizer(places.map((place) => texts[place]), { padding: true, truncation: true });
      const { sentence_embedding } = await model(inputs);
      const width = sentence_embedding.dims[1];
      places.forEach((place, row) => {
        vectors[place] = sentence_embedding.data.slice(row * width, (row + 1) * width);
      });
    }
    return vectors;
  };
  return { encode };
});
