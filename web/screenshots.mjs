// Pictures of a run for the docs: node screenshots.mjs PAGE.html FOLDER

import { drawn, launch, open } from "./test/browser.mjs";

const [file, folder] = process.argv.slice(2);
const browser = await launch();
const shoot = async (name, options, act) => {
  const { page } = await open(browser, `file://${file}`, { offline: true, ...options });
  await page.waitForSelector(".bar canvas");
  await act(page);
  await drawn(page);
  await page.screenshot({ path: `${folder}/${name}.png`, fullPage: options.fullPage ?? false });
  await page.context().close();
};
const pointAtBlock = async (page) => {
  const bar = page.locator(".bar").nth(2);
  const box = await bar.boundingBox();
  await page.mouse.move(box.x + box.width * 0.45, box.y + 4);
};
await shoot("view", { viewport: { width: 1280, height: 640 } }, pointAtBlock);
await shoot("view-dark", { viewport: { width: 1280, height: 640 }, colorScheme: "dark" }, async (page) =>
  page.locator(".how button").nth(2).click(),
);
await shoot("view-phone", { viewport: { width: 390, height: 780 } }, async () => {});
await browser.close();
