// Runs the model by WebAssembly, beside the page, so that the page stays responsive.
let library, generator, criterion;

const tell = (kind, fields) => self.postMessage({ kind, ...fields });

/** Load the library and a model folder, both from this server: nothing is fetched from elsewhere. */
async function load({ model, library: modules }) {
  library = await import(`${modules}@huggingface/transformers/dist/transformers.min.js`);
  const { env, pipeline, InterruptableStoppingCriteria } = library;
  const folder = new URL(model);
  const parts = folder.pathname.replace(/\/+$/, "").split("/");
  const name = parts.pop();
  env.allowLocalModels = true;
  env.allowRemoteModels = false;
  env.localModelPath = `${parts.join("/")}/`; // a path: with a whole address, the library looks for no tokenizer
  env.useBrowserCache = env.useWasmCache = false;
  const runtime = `${modules}onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
  const progress_callback = ({ status, file, progress }) => {
    if (status === "progress") tell("loading", { file, percent: Math.round(progress) });
  };
  generator = await pipeline("text-generation", name, { device: "wasm", progress_callback });
  criterion = new InterruptableStoppingCriteria();
  pauseBetweenTokens(generator.model.sessions.model);
  tell("ready");
}

/** Let messages arrive between two tokens: WebAssembly computes without a pause, and "stop" would wait for the end. */
function pauseBetweenTokens(session) {
  const run = session.run.bind(session);
  session.run = async (...inputs) => {
    await new Promise((resolve) => setTimeout(resolve));
    return run(...inputs);
  };
}

/** Answer a conversation greedily, piece by piece. */
async function ask({ messages, most }) {
  const { input_ids } = generator.tokenizer.apply_chat_template(messages, { add_generation_prompt: true });
  const room = generator.model.config.max_position_embeddings - input_ids.dims[1]; // the library does not look
  if (room < 1) return tell("refused", { message: "the message is longer than the model's context" });
  criterion.reset();
  let tokens = 0;
  const begin = performance.now();
  const streamer = new library.TextStreamer(generator.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => tell("piece", { text }),
    token_callback_function: () => (tokens += 1),
  });
  const options = { max_new_tokens: Math.min(most, room), do_sample: false };
  await generator(messages, { ...options, streamer, stopping_criteria: criterion });
  tell("done", { tokens, seconds: (performance.now() - begin) / 1000 });
}

const tasks = { load, ask, stop: () => criterion?.interrupt() };
self.addEventListener("message", ({ data }) =>
  Promise.resolve(tasks[data.kind](data)).catch((error) => tell("failed", { message: error.message })),
);
