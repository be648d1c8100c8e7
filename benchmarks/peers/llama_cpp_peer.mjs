// llama.cpp, by node-llama-cpp: each context encodes one text after the other; a batch are contexts side by side.
import { getLlama, readGgufFileInfo } from "node-llama-cpp";
import { answer } from "./protocol.mjs";

const POOLING = { mean_tokens: 1, cls_token: 2, lasttoken: 3 };

await answer(async ({ model: modelPath, pooling, max_length, threads: maxThreads }) => {
  const { metadata } = await readGgufFileInfo(modelPath);
  const name = metadata.general.architecture;
  // The converter tells how to pool for some architectures only.
  const told = metadata[name].pooling_type ?? POOLING[pooling];
  if (told === undefined) throw new Error(`llama.cpp does not pool by ${pooling}`);
  const llama = await getLlama({ gpu: false, maxThreads, build: "never", logLevel: "error" });
  const model = await llama.loadModel({ modelPath, gpuLayers: 0, metadataOverrides: { [name]: { pooling_type: told } } });
  let contexts = [];
  const open = async (count) => {
    for (const context of contexts) await context.dispose();
    const room = max_length + 8;
    const options = { contextSize: room, batchSize: room, threads: Math.ceil(maxThreads / count) };
    contexts = await Promise.all(Array.from({ length: count }, () => model.createEmbeddingContext(options)));
  };
  const encode = async (texts, count) => {
    if (contexts.length !== count) await open(count);
    const vectors = new Array(texts.length);
    let next = 0;
    const work = async (context) => {
      while (next < texts.length) {
        const place = next++;
        const tokens = model.tokenize(texts[place]).slice(0, max_length - 2); // with one before and one after them
        vectors[place] = (await context.getEmbeddingFor(tokens)).vector;
      }
    };
    await Promise.all(contexts.map(work));
    return vectors;
  };
  return { encode };
});
