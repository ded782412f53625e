// The page: what is typed goes to a worker, what the model writes comes back in pieces.
//
// The address names two folders, relative to this page or absolute on this server:
//   ?model=FOLDER    what `rk-export bundle OUT --for transformers.js` wrote; default ../../out/demo/transformers.js
//   &library=FOLDER  node_modules with @huggingface/transformers; default ../../node_modules
const at = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const folder = (name, otherwise) => {
  const url = new URL(`${query.get(name) ?? otherwise}/`, location.href);
  // A link to this page must not make it run code from elsewhere.
  if (url.origin !== location.origin) throw new Error(`${name} must lie on this server`);
  return url.href;
};

const worker = new Worker("worker.mjs", { type: "module" });
const busy = (yes) => {
  at("send").disabled = yes;
  at("stop").disabled = !yes;
};

const told = {
  loading: ({ file, percent }) => (at("state").textContent = `Loading ${file}: ${percent} %`),
  ready() {
    at("state").textContent = "Ready.";
    at("send").disabled = false;
  },
  piece: ({ text }) => at("answer").append(text),
  done({ tokens, seconds }) {
    at("state").textContent = `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second.`;
    busy(false);
  },
  refused({ message }) {
    at("state").textContent = `Not possible: ${message}.`;
    busy(false);
  },
  failed({ message }) {
    at("state").textContent = `It failed: ${message}`;
    busy(true);
    at("stop").disabled = true;
  },
};
worker.addEventListener("message", ({ data }) => told[data.kind](data));
worker.addEventListener("error", () => told.failed({ message: "the worker does not start; is the library there?" }));

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  at("answer").replaceChildren();
  busy(true);
  worker.postMessage({ kind: "ask", messages: [{ role: "user", content: at("prompt").value }], most: 128 });
});
at("stop").addEventListener("click", () => worker.postMessage({ kind: "stop" }));

try {
  const model = folder("model", "../../out/demo/transformers.js");
  worker.postMessage({ kind: "load", model, library: folder("library", "../../node_modules") });
} catch (error) {
  told.failed({ message: error.message });
}
