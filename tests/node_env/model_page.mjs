// The sample page with a model in the browser: {url, prompt, stop} -> {answer, state, hosts, complaints}.
// With `stop`, the answer is stopped when its first piece is there.
import { inBrowser } from "./browser.mjs";
import { answer, asked } from "./libraries.mjs";

const { url, prompt, stop } = await asked();
answer(
  await inBrowser(url, async (page) => {
    await page.waitForFunction(() => /Ready|failed/.test(document.getElementById("state").textContent));
    const state = await page.textContent("#state");
    if (state !== "Ready.") return { state, answer: "" };
    await page.fill("#prompt", prompt);
    await page.click("#send");
    if (stop) {
      await page.waitForFunction(() => document.getElementById("answer").textContent);
      await page.click("#stop");
    }
    await page.waitForFunction(() => /a second|Not possible|failed/.test(document.getElementById("state").textContent));
    return { state: await page.textContent("#state"), answer: await page.textContent("#answer") };
  }),
);
