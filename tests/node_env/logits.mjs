// Runs a graph once in onnxruntime-node, from an empty cache: {model, ids, kept} -> {names, dims, data}.
// `data` are the bytes of the first output in base64; `kept` is fed as num_logits_to_keep where it is not null.
import { answer, asked, library } from "./libraries.mjs";

const ort = (await library("onnxruntime-node")).default;
const { model, ids, kept } = await asked();
const session = await ort.InferenceSession.create(model, { logSeverityLevel: 3, intraOpNumThreads: 1 });

const whole = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values.flat().map(BigInt)), dims);
const dims = [ids.length, ids[0].length];
const feeds = { input_ids: whole(ids, dims), attention_mask: whole(ids.map((row) => row.map(() => 1)), dims) };
if (kept !== null) feeds.num_logits_to_keep = whole([kept], []);
for (const { name, type, shape } of session.inputMetadata) {
  if (!name.startsWith("past_key_values.")) continue;
  const values = type === "float16" ? new Uint16Array(0) : new Float32Array(0);
  feeds[name] = new ort.Tensor(type, values, [ids.length, shape[1], 0, shape[3]]);
}

const first = (await session.run(feeds))[session.outputNames[0]];
answer({
  names: session.inputNames,
  dims: first.dims,
  data: Buffer.from(first.data.buffer, first.data.byteOffset, first.data.byteLength).toString("base64"),
});
