// Frames while rounds and bars are gone through: node measure.mjs PAGE.html
// Prints the time between frames while the slider moves over all rounds, then the pointer over a bar.

import { launch, open } from "./test/browser.mjs";

const browser = await launch();
const { page, problems } = await open(browser, `file://${process.argv[2]}`, { offline: true });
await page.waitForSelector(".bar canvas");

const frames = (act) =>
  page.evaluate(async (source) => {
    const act = new Function(`return (${source})`)();
    const times = [];
    for (let step = 0; step < 100; step += 1) {
      const start = performance.now();
      act(step);
      await new Promise(requestAnimationFrame);
      await new Promise(requestAnimationFrame); // what the first has painted is there
      times.push((performance.now() - start) / 2);
    }
    times.sort((a, b) => a - b);
    return { median_ms: times[50], p95_ms: times[95], worst_ms: times[99] };
  }, act.toString());

const slider = await frames((step) => {
  const input = document.querySelector(".rounds input");
  input.value = String(step % (Number(input.max) + 1));
  input.dispatchEvent(new Event("input", { bubbles: true }));
});
const pointer = await frames((step) => {
  const bars = document.querySelectorAll(".bar");
  const box = bars[step % bars.length].getBoundingClientRect();
  bars[step % bars.length].dispatchEvent(
    new PointerEvent("pointermove", {
      bubbles: true,
      pointerType: "mouse",
      clientX: box.left + (box.width * ((step * 37) % 100)) / 110,
      clientY: box.top + 4,
    }),
  );
});
const agents = await page.locator(".bar").count();
const rounds = await page.locator("tbody tr").count();
console.log(JSON.stringify({ agents, rounds, slider, pointer, problems }, null, 1));
await browser.close();
