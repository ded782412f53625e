// The sample page with a model in the browser: {url, prompt} -> {answer, state, hosts, complaints}.
import { inBrowser } from "./browser.mjs";
import { answer, asked } from "./libraries.mjs";

const { url, prompt } = await asked();
answer(
  await inBrowser(url, async (page) => {
    await page.waitForFunction(() => /Ready|failed/.test(document.getElementById("state").textContent));
    const state = await page.textContent("#state");
    if (state !== "Ready.") return { state, answer: "" };
    await page.fill("#prompt", prompt);
    await page.click("#send");
    await page.waitForFunction(() => /a second|Not possible|failed/.test(document.getElementById("state").textContent));
    return { state: await page.textContent("#state"), answer: await page.textContent("#answer") };
  }),
);
