// The page of a recorded run, opened from disk without a network. RUN_HTML is the page, RUN_JSON the
// document that it was made of; tests/test_page.py makes both and says what is in them.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, beforeEach, test } from "node:test";
import { colourAt, drawn, launch, open } from "./browser.mjs";

const run = JSON.parse(readFileSync(process.env.RUN_JSON, "utf8"));
const url = `file://${process.env.RUN_HTML}`;
const number = (text) => Number(text.replaceAll(",", ""));

let browser, page, problems;

before(async () => {
  browser = await launch();
});
after(() => browser.close());

beforeEach(async () => {
  ({ page, problems } = await open(browser, url, { offline: true }));
  await page.waitForSelector(".bar canvas");
});

const quiet = (name, body) =>
  test(name, async () => {
    await body();
    assert.deepEqual(problems, []);
    await page.context().close();
  });

const showRound = async (index) => {
  await page.locator(".rounds input").fill(String(index));
  await drawn(page);
};
const scaleOf = (round) => Math.max(...round.agents.map((agent) => agent.prompt + agent.generated));
const middleOf = (round, agent, part) => {
  const stop = agent.parts[part + 1]?.[0] ?? agent.prompt;
  return (agent.parts[part][0] + stop) / 2 / scaleOf(round);
};
const detail = async (name) =>
  page.locator(".details dl div", { has: page.locator(`dt:text-is("${name}")`) }).locator("dd").innerText();
const point = async (round, row, part) => {
  const bar = page.locator(".bar").nth(row);
  const box = await bar.boundingBox();
  const x = box.x + box.width * middleOf(round, round.agents[row], part);
  await page.mouse.move(x, box.y + 4);
};

quiet("begins with the first round in which something is shared", async () => {
  assert.match(await page.locator(".rounds label").innerText(), /Round 2 of 3/);
});

quiet("its figures are the document's, in every round", async () => {
  for (const [index, round] of run.rounds.entries()) {
    await showRound(index);
    const lines = page.locator(".compare .number");
    const { none, prefix, computed } = round.tokens;
    assert.deepEqual((await lines.allInnerTexts()).map(number), [none, prefix, computed]);
    const cells = page.locator("tr.now td[data-figure]");
    const shown = await cells.evaluateAll((all) =>
      Object.fromEntries(all.map((cell) => [cell.dataset.figure, cell.innerText])),
    );
    for (const [figure, text] of Object.entries(shown))
      assert.equal(number(text), round.tokens[figure], figure);
    assert.deepEqual(await page.locator(".bars .name").allInnerTexts(), round.agents.map((a) => a.agent));
  }
  assert.equal(await page.locator("tbody tr").count(), run.rounds.length);
});

quiet("the slider and the buttons go through the rounds", async () => {
  const title = page.locator(".rounds label span");
  await page.locator(".rounds input").focus();
  await page.keyboard.press("ArrowRight");
  assert.match(await title.innerText(), /Round 3 /);
  await page.keyboard.press("Home");
  assert.match(await title.innerText(), /Round 1 /);
  assert.match(await page.locator("section", { hasText: "How it works" }).innerText(), /nothing to share/);
  await page.getByLabel("Next round").click();
  assert.match(await title.innerText(), /Round 2 /);
  await page.locator("tbody button").nth(2).click();
  assert.match(await title.innerText(), /Round 3 /);
});

quiet("what is pointed at is told, and what it says stays text", async () => {
  const round = run.rounds[1];
  for (const [row, agent] of round.agents.entries())
    for (const part of agent.parts.keys()) {
      await point(round, row, part);
      await page.locator(".details h3", { hasText: `prompt of ${agent.agent}` }).waitFor();
      const [start, segment] = agent.parts[part];
      const stop = agent.parts[part + 1]?.[0] ?? agent.prompt;
      assert.equal(number(await detail("Tokens")), stop - start);
      const text = await page.locator(".details blockquote").evaluate((quote) => quote.textContent);
      assert.equal(text, run.segments[segment].text.trim());
    }
  assert.ok(round.agents.some((agent) => run.segments[agent.parts[0][1]].text.includes("<script>")));
});

quiet("a block has one colour wherever it stands, strong where it is computed", async () => {
  const round = run.rounds[1];
  const owner = round.agents.findIndex((agent) => agent.pieces.some((piece) => piece[2] === 2));
  const mirrors = [...round.agents.keys()].filter((row) => row !== owner);
  const shared = [...round.agents[owner].parts.keys()].filter((part) => round.agents[owner].parts[part][2] === "shared");
  for (const way of ["by agent", "by run"]) {
    await page.getByLabel(way, { exact: true }).check();
    await page.mouse.move(0, 0);
    await drawn(page);
    const seen = new Set();
    for (const part of shared) {
      const segment = round.agents[owner].parts[part][1];
      const colours = [];
      for (const row of mirrors) {
        const agent = round.agents[row];
        const own = agent.parts.findIndex((candidate) => candidate[1] === segment);
        colours.push(String(await colourAt(page, row, middleOf(round, agent, own))));
      }
      assert.equal(new Set(colours).size, 1, `${way}: ${colours}`);
      const strong = String(await colourAt(page, owner, middleOf(round, round.agents[owner], part)));
      assert.notEqual(strong, colours[0]);
      seen.add(strong);
    }
    if (way === "by agent") assert.equal(seen.size, shared.length); // each was said by another
  }
});

quiet("keys move over the parts of a bar and from bar to bar", async () => {
  const round = run.rounds[1];
  const bar = page.locator(".bar").first();
  await bar.focus();
  const parts = round.agents[0].parts;
  for (let part = 0; part < parts.length; part += 1) {
    assert.equal(await bar.getAttribute("aria-valuenow"), String(part + 1));
    const stop = parts[part + 1]?.[0] ?? round.agents[0].prompt;
    const said = await bar.getAttribute("aria-valuetext");
    assert.ok(said.includes(`Tokens: ${stop - parts[part][0]}.`), said);
    await page.keyboard.press("ArrowRight");
  }
  assert.match(await bar.getAttribute("aria-valuetext"), /^Answer/);
  assert.match(await page.locator(".details blockquote").innerText(), /./);
  await page.keyboard.press("Home");
  assert.equal(await bar.getAttribute("aria-valuenow"), "1");
  await page.keyboard.press("ArrowDown");
  const focused = await page.evaluate(() => document.activeElement.getAttribute("aria-label"));
  assert.equal(focused, `Prompt of ${round.agents[1].agent}`);
  await page.keyboard.press("Escape");
  assert.equal(await page.locator(".details.empty").count(), 1);
});

quiet("the steps of the algorithm name this round's owner and offsets", async () => {
  const round = run.rounds[1];
  const owner = round.agents.find((agent) => agent.pieces.some((piece) => piece[2] === 2));
  const mirror = round.agents.find((agent) => agent.pieces.some((piece) => piece[2] === 3));
  const offset = mirror.pieces.find((piece) => piece[2] === 3)[5];
  const text = page.locator(".how > p");
  const steps = page.locator(".how button");
  await steps.nth(0).click();
  assert.match(await text.innerText(), new RegExp(`prompts of ${round.agents.length} agents`));
  await steps.nth(1).click();
  assert.ok((await text.innerText()).includes(owner.agent));
  await steps.nth(2).click();
  assert.ok((await text.innerText()).includes(`offset ${offset > 0 ? "+" : ""}${offset}`));
  assert.equal(await steps.nth(2).getAttribute("aria-pressed"), "true");
});

test("it fits a desk and a phone, light and dark", async () => {
  for (const colorScheme of ["light", "dark"])
    for (const width of [1280, 390]) {
      const opened = await open(browser, url, { offline: true, colorScheme, viewport: { width, height: 800 } });
      await opened.page.waitForSelector(".bar canvas");
      const overflow = await opened.page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(overflow <= 0, `${overflow} px too wide at ${width}`);
      const [ground, ink] = await opened.page.evaluate(() => {
        const style = getComputedStyle(document.body);
        return [style.backgroundColor, style.color].map((colour) => Number(colour.match(/\d+/)[0]));
      });
      assert.equal(ground < ink, colorScheme === "dark");
      assert.deepEqual(opened.problems, []);
      await opened.page.context().close();
    }
});
