// The chat page of the server, as somebody at a keyboard uses it: {url, task, ...} -> what can be seen.
import { inBrowser } from "./browser.mjs";
import { answer, asked } from "./libraries.mjs";

const job = await asked();
const answers = (page) => page.locator("article.assistant .body");

async function say(page, text) {
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
}

/** Send a message and wait until the answer is complete or an error is shown. */
async function ask(page, text) {
  await say(page, text);
  await page.waitForFunction(() => document.getElementById("stop").hidden);
  return {
    answer: (await answers(page).count()) ? await answers(page).last().innerText() : null,
    facts: (await page.locator(".facts").count()) ? await page.locator(".facts").last().innerText() : null,
    error: (await page.isVisible("#error")) ? await page.textContent("#error") : null,
    prompt: await page.inputValue("#prompt"),
  };
}

const tasks = {
  /** A message of two lines, written with Shift+Enter, under settings that were changed. */
  async stream(page) {
    await page.selectOption("#model", job.model);
    await page.click("#more");
    await page.fill("#system", "Be kind.");
    await page.fill("#temperature", "0");
    await page.fill("#most", "20");
    await page.locator("#prompt").pressSequentially("one");
    await page.press("#prompt", "Shift+Enter");
    await page.locator("#prompt").pressSequentially("two");
    await page.press("#prompt", "Enter");
    await page.waitForFunction(() => document.querySelector(".facts"));
    const models = await page.locator("#model option").allInnerTexts();
    const status = await page.textContent("#status");
    return { models, status, question: await page.locator("article.user .body").innerText(), ...(await ask(page, "again")) };
  },
  /** What becomes of code and of markup in an answer. */
  async fences(page) {
    const seen = await ask(page, "fences");
    const code = await page.locator("article.assistant pre").allInnerTexts();
    const text = await page.locator("article.assistant p.text").allInnerTexts();
    return { ...seen, code, text, images: await page.locator("article img, article b").count() };
  },
  /** Stop an answer, by the key or the button, and go on with the conversation. */
  async stop(page) {
    await page.click("#more");
    await page.fill("#temperature", "0");
    await say(page, job.prompt);
    await page.waitForFunction(() => document.querySelector("article.assistant .body").textContent.length > 20);
    const writing = { send: await page.isVisible("#send"), busy: await page.getAttribute("#log", "aria-busy") };
    await (job.by === "key" ? page.keyboard.press("Escape") : page.click("#stop"));
    await page.waitForFunction(() => document.getElementById("stop").hidden);
    const stopped = await answers(page).last().innerText();
    await page.waitForTimeout(300);
    const later = await answers(page).last().innerText();
    return { writing, stopped, later, next: await ask(page, job.next) };
  },
  /** What is shown after each of some messages, and how many messages stay. */
  async errors(page) {
    const found = {};
    for (const word of job.words) found[word] = await ask(page, word);
    return { found, articles: await page.locator("article").count() };
  },
  /** An API key, asked for and then given. */
  async key(page) {
    const before = await ask(page, "locked door");
    const open = await page.isVisible("#key");
    await page.fill("#key", job.key);
    await page.press("#key", "Tab");
    const after = await ask(page, "locked door");
    const kept = await page.evaluate(() => [JSON.stringify(sessionStorage), localStorage.length, document.cookie]);
    return { before, open, after, kept };
  },
  /** A new chat while an answer is written. */
  async fresh(page) {
    await say(page, "endless");
    await page.waitForFunction(() => document.querySelector("article.assistant .body").textContent.length > 20);
    await page.click("#fresh");
    await page.waitForTimeout(300);
    const articles = await page.locator("article").count();
    const visible = await page.isVisible("#empty");
    return { articles, visible, next: await ask(page, "hello") };
  },
  /** Names of all controls, how wide the page is at some widths, and the colours of both schemes; pictures if asked. */
  async looks(page) {
    await ask(page, "hello there, this is a question");
    await ask(page, "fences");
    await page.click("#more");
    const names = await page.evaluate(() =>
      [...document.querySelectorAll("input, select, textarea, button")].map(
        (one) => one.labels?.[0]?.textContent.trim() || one.textContent.trim(),
      ),
    );
    const overflow = {}, colours = {};
    for (const scheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme: scheme });
      for (const width of [360, 1200]) {
        await page.setViewportSize({ width, height: 720 });
        overflow[width] = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
        if (job.pictures) await page.screenshot({ path: `${job.pictures}/chat-${scheme}-${width}.png` });
      }
      colours[scheme] = await page.evaluate(() =>
        [".hint", "article.assistant .text", "article.user .text", "#send", "pre", "label"].map((selector) => {
          const element = document.querySelector(selector);
          let under = element;
          while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") under = under.parentElement;
          return [selector, getComputedStyle(element).color, getComputedStyle(under).backgroundColor];
        }),
      );
    }
    return { names, overflow, colours };
  },
};

answer(
  await inBrowser(job.url, async (page) => {
    await page.waitForFunction(() => document.getElementById("model").options.length > 0);
    return tasks[job.task](page);
  }),
);
