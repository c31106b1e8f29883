// Asks an exported directory by transformers.js, as it is: node ask.mjs LIBRARY DIRECTORY QUESTIONS.json
// LIBRARY is the library's main module. Prints for each question the prompt's ids, the new tokens, the words and the
// lengths of the caches behind the prompt and at the end; an error's words where one is raised.
import { readFileSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [library, directory, questions] = process.argv.slice(2);
const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } = await import(pathToFileURL(library));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(directory) + path.sep;
const name = path.basename(directory);

const given = JSON.parse(readFileSync(questions, "utf8"));
const model = await AutoModelForImageTextToText.from_pretrained(name, given.options ?? {});
const needsProcessor = given.questions.some((question) => question.image !== undefined);
const processor = needsProcessor ? await AutoProcessor.from_pretrained(name) : null;

function tensor({ type, data, dims }) {
  const kinds = { int64: (x) => BigInt64Array.from(x, BigInt), float32: Float32Array.from.bind(Float32Array) };
  return new Tensor(type, type === "bool" ? Uint8Array.from(data) : kinds[type](data), dims);
}

async function inputsOf(question) {
  if (question.inputs) {
    return Object.fromEntries(Object.entries(question.inputs).map(([key, value]) => [key, tensor(value)]));
  }
  const content = [{ type: "image" }, { type: "text", text: question.text }];
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const image = await RawImage.read(question.image);
  const first = processor.constructor.name.startsWith("Llava") ? [image, text] : [text, image];
  return await processor(...first);
}

function lengths(cache) {
  const keys = Object.entries(cache).filter(([key]) => key.endsWith(".key"));
  return keys.sort(([a], [b]) => a.split(".")[1] - b.split(".")[1]).map(([, value]) => value.dims[2]);
}

const answers = [];
for (const question of given.questions) {
  try {
    const inputs = await inputsOf(question);
    const { sequences, past_key_values } = await model.generate({
      ...inputs,
      ...given.generate,
      do_sample: false,
      return_dict_in_generate: true,
    });
    const prompt = inputs.input_ids.dims[1];
    const tokens = sequences.tolist().map((row) => row.slice(prompt).map(Number));
    answers.push({
      ids: inputs.input_ids.tolist().map((row) => row.map(Number)),
      tokens,
      words: processor ? processor.batch_decode(sequences.slice(null, [prompt, null]), { skip_special_tokens: true }) : null,
      lengths: lengths(past_key_values),
    });
  } catch (error) {
    answers.push({ error: String(error) });
  }
}
console.log(JSON.stringify(answers));
