// The dashboard of a server, DASHBOARD, whose key is KEY if it has one. ROUND is the body of a round.

import assert from "node:assert/strict";
import { test } from "node:test";
import { launch, open } from "./browser.mjs";

const url = process.env.DASHBOARD;
const key = process.env.KEY;

const ask = async () => {
  const answer = await fetch(new URL("/v1/rounds", url), {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${key ?? "any"}` },
    body: process.env.ROUND,
  });
  assert.equal(answer.status, 200);
  return answer.json();
};

test("a run that goes on is followed", async () => {
  const browser = await launch();
  try {
    const options = key === undefined ? {} : { httpCredentials: { username: "x", password: key } };
    const { page, problems } = await open(browser, url, options);
    await page.waitForSelector("text=No round has begun yet");
    for (const number of [1, 2]) {
      const told = await ask();
      await page.waitForSelector(`tbody tr:nth-child(${number})`);
      await page.locator(".rounds em").waitFor({ state: "detached" });
      assert.match(await page.locator(".rounds label span").innerText(), new RegExp(`Round ${number} of ${number}`));
      const prompt = told.agents.reduce((sum, agent) => sum + agent.usage.prompt_tokens, 0);
      const shown = await page.locator("tr.now td").nth(1).innerText();
      assert.equal(Number(shown.replaceAll(",", "")), prompt);
      await page.locator(".bar").first().hover();
      assert.match(await page.locator(".details").innerText(), /no text/);
    }
    assert.deepEqual(problems.filter((problem) => !problem.includes("401")), []);
  } finally {
    await browser.close();
  }
});
