// A page in a real Chromium, of which nothing may go wrong unnoticed.

import { chromium } from "playwright-core";

const ARGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export const launch = () =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGS });

/** Open a page; `problems` collects whatever its console complains of. */
export async function open(browser, url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const problems = [];
  page.on("console", (message) => {
    // Reading pixels back is what the tests do, not the page.
    if (message.text().includes("willReadFrequently")) return;
    problems.push(`${message.type()}: ${message.text()}`);
  });
  page.on("pageerror", (error) => problems.push(`error: ${error.message}`));
  page.on("dialog", (dialog) => {
    problems.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  page.on("requestfailed", (request) => problems.push(`failed: ${request.url()}`));
  await page.goto(url);
  return { page, problems };
}

/** Wait until the next frame is drawn. */
export const drawn = (page) =>
  page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));

/** The colour of a bar at a share of the scale and of the height: [red, green, blue]. */
export const colourAt = (page, row, share) =>
  page.evaluate(
    ([row, share]) => {
      const canvas = document.querySelectorAll(".bar canvas")[row];
      const x = Math.round(canvas.width * share);
      const context = canvas.getContext("2d");
      return [...context.getImageData(x, canvas.height / 4, 1, 1).data].slice(0, 3);
    },
    [row, share],
  );
