// Loads a model folder with transformers.js as its users do, and does one thing:
// {folder, task: "tokens" | "chat" | "batch" | "features", ...} -> what each of the functions below returns.
import { basename, dirname } from "node:path";

import { answer, asked, library } from "./libraries.mjs";

const { AutoModel, AutoModelForCausalLM, AutoTokenizer, env, pipeline } = await library("@huggingface/transformers");
const job = await asked();
env.localModelPath = dirname(job.folder);
env.allowRemoteModels = false;
const name = basename(job.folder);
const options = { session_options: { logSeverityLevel: 3, intraOpNumThreads: 1 } };
const greedy = { max_new_tokens: job.new_tokens, do_sample: false };

const tasks = {
  /** Token ids of a prompt and its continuation, and the latter's text. */
  async tokens() {
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    const model = await AutoModelForCausalLM.from_pretrained(name, options);
    const inputs = tokenizer(job.prompt);
    const ids = (await model.generate({ ...inputs, ...greedy })).tolist()[0].map(Number);
    const prompt_tokens = inputs.input_ids.dims[1];
    return { ids, text: tokenizer.decode(ids.slice(prompt_tokens), { skip_special_tokens: true }) };
  },
  /** The prompt that the template makes of messages, and the pipeline's answer to them. */
  async chat() {
    const generator = await pipeline("text-generation", name, options);
    const written = { tokenize: false, add_generation_prompt: true };
    const prompt = generator.tokenizer.apply_chat_template(job.messages, written);
    const [{ generated_text }] = await generator(job.messages, greedy);
    return { prompt, content: generated_text.at(-1).content };
  },
  /** Token ids of several prompts padded on the left, padding included, and which are padding. */
  async batch() {
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    const model = await AutoModelForCausalLM.from_pretrained(name, options);
    tokenizer.padding_side = "left";
    const inputs = tokenizer(job.prompts, { padding: true });
    const ids = (await model.generate({ ...inputs, ...greedy })).tolist();
    const mask = inputs.attention_mask.tolist();
    return { ids: ids.map((row) => row.map(Number)), mask: mask.map((row) => row.map(Number)) };
  },
  /** The mean of the hidden states of a text, as a unit vector. */
  async features() {
    const extractor = await pipeline("feature-extraction", name, options);
    return { values: (await extractor(job.prompt, { pooling: "mean", normalize: true })).tolist()[0] };
  },
  /** Which model types there is a class for: of models that continue texts, or of encoders. */
  async types() {
    // AutoModel says that it supports every type, and takes a plain class for those that it does not list.
    const listed = (type) => AutoModel.MODEL_CLASS_MAPPINGS.some((mapping) => mapping.has(type));
    const known = job.encoders ? listed : (type) => AutoModelForCausalLM.supports(type);
    return { known: job.types.filter(known) };
  },
};
answer(await tasks[job.task]());
