// The packages of package.json. They are installed outside this folder: RK_NODE_MODULES says where.
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const modules = process.env.RK_NODE_MODULES;
if (!modules) throw new Error("run `make test-node` or `make test-browser`: RK_NODE_MODULES is not set");
const require = createRequire(pathToFileURL(join(modules, "any.js")));

/** Import a package by its name. */
export const library = (name) => import(pathToFileURL(require.resolve(name)).href);

/** Return the JSON that the caller wrote to standard input. */
export async function asked() {
  let text = "";
  for await (const piece of process.stdin.setEncoding("utf-8")) text += piece;
  return JSON.parse(text);
}

/** Print the answer as the last line of standard output. */
export const answer = (value) => process.stdout.write(`\n${JSON.stringify(value)}\n`);
