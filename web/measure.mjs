// Frames while rounds and bars are gone through: node measure.mjs PAGE.html
// Prints the time between frames while the slider moves over all rounds, then the pointer over a bar.

import { launch, open } from "./test/browser.mjs";

const browser = await launch();
const { page, problems } = await open(browser, `file://${process.argv[2]}`, { offline: true });
await page.waitForSelector(".bar canvas");

const frames = (kind) =>
  page.evaluate(async (kind) => {
    const acts = {
      slider(step) {
        const input = document.querySelector(".rounds input");
        input.value = String(step % (Number(input.max) + 1));
        input.dispatchEvent(new Event("input", { bubbles: true }));
      },
      pointer(step) {
        const bars = document.querySelectorAll(".bar");
        const bar = bars[step % bars.length];
        const box = bar.getBoundingClientRect();
        const [clientX, clientY] = [box.left + (box.width * ((step * 37) % 100)) / 110, box.top + 4];
        bar.dispatchEvent(
          new PointerEvent("pointermove", { bubbles: true, pointerType: "mouse", clientX, clientY }),
        );
      },
    };
    const times = [];
    for (let step = 0; step < 100; step += 1) {
      const start = performance.now();
      acts[kind](step);
      await new Promise(requestAnimationFrame);
      await new Promise(requestAnimationFrame); // what the first has painted is there
      times.push((performance.now() - start) / 2);
    }
    times.sort((a, b) => a - b);
    return { median_ms: times[50], p95_ms: times[95], worst_ms: times[99] };
  }, kind);

const slider = await frames("slider");
const pointer = await frames("pointer");
const agents = await page.locator(".bar").count();
const rounds = await page.locator("tbody tr").count();
console.log(JSON.stringify({ agents, rounds, slider, pointer, problems }, null, 1));
await browser.close();
