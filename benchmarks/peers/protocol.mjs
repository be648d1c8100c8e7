// What protocol.py does, for peers in JavaScript.
import { readFileSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";

export async function answer(load) {
  const { encode, note = "" } = await load(JSON.parse(process.argv[2]));
  await encode(["What does this function return?"], 1);
  console.log(JSON.stringify({ peer: "ready", note }));
  for await (const line of createInterface({ input: process.stdin })) {
    const asked = JSON.parse(line);
    const texts = JSON.parse(readFileSync(asked.texts, "utf8"));
    const start = performance.now();
    const vectors = await encode(texts, asked.batch_size);
    const seconds = (performance.now() - start) / 1000;
    if (asked.vectors) writeFileSync(asked.vectors, Float32Array.from(vectors.flatMap((vector) => Array.from(vector))));
    console.log(JSON.stringify({ peer: "encoded", seconds }));
  }
  process.exit(0);
}
