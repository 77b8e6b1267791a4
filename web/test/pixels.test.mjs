// The bars of a recorded run, pixel by pixel, against those of a picture. RUN_HTML is the page,
// PICTURE the picture; with UPDATE=1 it is made anew, to be looked at before it is committed.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { test } from "node:test";
import { drawn, launch, open } from "./browser.mjs";

// Text is not compared, since fonts differ from machine to machine; bars have none.
const stacked = (page) =>
  page.evaluate(() => {
    const bars = [...document.querySelectorAll(".bar canvas")];
    const sheet = document.createElement("canvas");
    sheet.width = bars[0].width;
    sheet.height = bars.reduce((sum, bar) => sum + bar.height + 4, 0);
    let y = 0;
    for (const bar of bars) {
      sheet.getContext("2d").drawImage(bar, 0, y);
      y += bar.height + 4;
    }
    return sheet.toDataURL("image/png");
  });

/** The share of pixels that differ by more than a shade. */
const difference = (page, one, other) =>
  page.evaluate(
    async ([one, other]) => {
      const pixels = async (source) => {
        const image = new Image();
        image.src = source;
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.width, image.height];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return context.getImageData(0, 0, image.width, image.height);
      };
      const [a, b] = [await pixels(one), await pixels(other)];
      if (a.width !== b.width || a.height !== b.height)
        return `${a.width} x ${a.height} in place of ${b.width} x ${b.height}`;
      let count = 0;
      for (let at = 0; at < a.data.length; at += 4)
        if ([0, 1, 2, 3].some((c) => Math.abs(a.data[at + c] - b.data[at + c]) > 8)) count += 1;
      return count / (a.data.length / 4);
    },
    [one, other],
  );

test("the bars look as they did", async () => {
  const browser = await launch();
  try {
    const { page, problems } = await open(browser, `file://${process.env.RUN_HTML}`, { offline: true });
    await page.waitForSelector(".bar canvas");
    const sheets = [];
    for (const way of ["by agent", "by run", "exact or not"]) {
      await page.getByLabel(way, { exact: true }).check();
      await drawn(page);
      sheets.push(await stacked(page));
    }
    for (const [index, sheet] of sheets.entries()) {
      const file = process.env.PICTURE.replace("*", String(index + 1));
      if (process.env.UPDATE) writeFileSync(file, Buffer.from(sheet.split(",")[1], "base64"));
      const picture = `data:image/png;base64,${readFileSync(file).toString("base64")}`;
      const share = await difference(page, sheet, picture);
      assert.ok(share < 0.002, `${file}: ${share} of its pixels differ`);
    }
    assert.deepEqual(problems, []);
  } finally {
    await browser.close();
  }
});
