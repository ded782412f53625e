// A headless browser for one task: the system's Chromium (RK_BROWSER), driven by playwright-core.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { library } from "./libraries.mjs";

const FLAGS = [
  ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
  ...["--disable-component-update", "--disable-sync"],
];

/** Open a page, run a task with it, and return its answer with what the page asked for and complained of. */
export async function inBrowser(url, task, options = {}) {
  const { chromium } = (await library("playwright-core")).default;
  const profile = await mkdtemp(join(tmpdir(), "rk-browser-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.RK_BROWSER,
    headless: true,
    args: FLAGS,
    viewport: { width: 1200, height: 800 },
    ...options,
  });
  try {
    const page = context.pages()[0] ?? (await context.newPage());
    page.setDefaultTimeout(30_000);
    const hosts = new Set(), complaints = [];
    context.on("request", (request) => hosts.add(new URL(request.url()).host));
    page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
    page.on("pageerror", (error) => complaints.push(String(error)));
    await page.goto(url);
    const found = await task(page);
    return { ...found, hosts: [...hosts].filter(Boolean), complaints };
  } finally {
    await context.close();
    await rm(profile, { recursive: true, force: true });
  }
}
