// Work, time and memory, as small charts.

import type { Agent, Round, RunDocument } from "./document";
import { computedTokens, promptTokens } from "./document";
import { bytes, percent, plural, seconds, times, tokens } from "./format";

/** What was computed, against what others would have. */
export function Work({ round }: { round: Round }) {
  const all = promptTokens(round);
  const done = computedTokens(round);
  const { prefix, generated } = round.tokens;
  const rows: [string, string, number | null][] = [
    ["Without reuse", "none", all],
    ["Prefix caching", "prefix", prefix],
    ["TokenDance", "here", done],
  ];
  return (
    <div class="work">
      <p class="headline">
        {plural(round.agents.filter((agent) => !agent.neutral).length, "agent")} read{" "}
        <b>{tokens(all)}</b> prompt tokens and said {tokens(generated)}.{" "}
        <b>{tokens(done)}</b> were computed, <b>{percent(done, all)}</b>
        {prefix !== null && prefix > done && (
          <> – prefix caching would have computed {times(prefix / done)} as many</>
        )}
        .
      </p>
      <div class="compare" role="img" aria-label={rows.map(([name, , value]) => `${name}: ${value === null ? "not known yet" : `${tokens(value)} tokens`}`).join(", ")}>
        {rows.map(([name, id, value]) => (
          <div class="line" key={id}>
            <span>{name}</span>
            <svg class={id} width="100%" height="12" aria-hidden="true">
              <rect width={`${((value ?? 0) / Math.max(all, 1)) * 100}%`} height="12" rx="2" />
            </svg>
            <span class="number">{value === null ? "…" : tokens(value)}</span>
          </div>
        ))}
      </div>
    </div>
  );
}

/** A round on a line for each agent: waiting, prefill, decode. */
export function TimeLine({ round }: { round: Round }) {
  const last = round.steps.at(-1)?.[1] ?? round.start_s;
  const stop = Math.max(round.stop_s ?? last, round.start_s + 1e-6);
  const x = (time: number) => ((time - round.start_s) / (stop - round.start_s)) * 100;
  const spans = (agent: Agent): [string, number, number][] => {
    const { first_step, first_token, finished } = agent.times;
    const begun = first_step ?? last;
    const read = first_token ?? (first_step === null ? begun : last);
    return [
      ["waiting", round.start_s, begun],
      [agent.pieces.some((piece) => piece[2] === 2) ? "owner" : "mirror", begun, read],
      ["decode", read, finished ?? (first_token === null ? read : last)],
    ];
  };
  return (
    <div class="timeline">
      {round.agents.map((agent, row) => {
        const parts = spans(agent);
        const said = parts
          .map(([name, from, to]) => `${name} ${seconds(to - from)}`)
          .join(", ");
        return (
          <div class="row" key={row} title={said}>
            <span class="name">{agent.agent}</span>
            <svg width="100%" height="14" role="img" aria-label={`${agent.agent}: ${said}`}>
              {parts.map(([name, from, to]) => (
                <rect
                  key={name}
                  class={name}
                  x={`${x(from)}%`}
                  width={`${Math.max(x(to) - x(from), 0)}%`}
                  y={name === "waiting" ? 6 : 0}
                  height={name === "waiting" ? 2 : 14}
                />
              ))}
            </svg>
          </div>
        );
      })}
      <div class="row axis">
        <span class="name" />
        <span class="ends">
          <span>0 s</span>
          <span>{plural(round.steps.length, "step")}</span>
          <span>{seconds(stop - round.start_s)}</span>
        </span>
      </div>
    </div>
  );
}

/** Bytes over rounds: dense, resident and stored. */
export function Memory({ run, round }: { run: RunDocument; round: Round }) {
  const stored = (one: Round) => one.memory.stored?.memory ?? 0;
  const disk = (one: Round) => one.memory.stored?.disk ?? 0;
  const most = Math.max(
    1,
    ...run.rounds.map((one) => Math.max(one.memory.dense, one.memory.resident, stored(one), disk(one))),
  );
  const hasDisk = run.rounds.some((one) => one.memory.stored?.disk != null);
  const kinds: [string, string, (one: Round) => number][] = [
    ["dense", "Dense: a cache for each agent", (one) => one.memory.dense],
    ["resident", "Resident: held at one time", (one) => one.memory.resident],
    ["stored", "Stored in memory: can be found again", stored],
    ...(hasDisk ? ([["disk", "Stored on disk", disk]] as [string, string, typeof disk][]) : []),
  ];
  const [width, height] = [600, 150];
  const slot = width / Math.max(run.rounds.length, 1);
  const bar = Math.min((slot * 0.8) / kinds.length, 26);
  return (
    <figure class="memory">
      <svg viewBox={`0 0 ${width} ${height}`} role="img" aria-label="KV memory over rounds; the table has the figures.">
        {run.rounds.map((one, index) => (
          <g key={one.number} class={one === round ? "now" : ""}>
            {one === round && <rect class="here" x={index * slot} width={slot} height={height} />}
            {kinds.map(([name, , value], kind) => (
              <rect
                key={name}
                class={name}
                x={index * slot + (slot - bar * kinds.length) / 2 + kind * bar}
                width={Math.max(bar - 1, 0.5)}
                y={height - (value(one) / most) * (height - 4)}
                height={(value(one) / most) * (height - 4)}
              />
            ))}
          </g>
        ))}
        <line x1="0" x2={width} y1={height} y2={height} />
      </svg>
      <figcaption>
        {kinds.map(([name, title, value]) => (
          <span key={name}>
            <i class={`key ${name}`} /> {title} <b>{bytes(value(round))}</b>
          </span>
        ))}
      </figcaption>
    </figure>
  );
}

/** All rounds, with their figures. */
export function RoundTable({ run, round, show }: { run: RunDocument; round: Round; show: (index: number) => void }) {
  const columns = ["Round", "Agents", "Prompt", "Computed", "Reused", "Corrected", "none", "prefix", "Fewer", "Last first token", "Dense", "Resident", "Stored"];
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Table of rounds">
      <table>
        <thead>
          <tr>
            {columns.map((name) => (
              <th scope="col" key={name}>{name === "none" || name === "prefix" ? <>with <code>{name}</code></> : name}</th>
            ))}
          </tr>
        </thead>
        <tbody>
          {run.rounds.map((one, index) => {
            const firsts = one.agents.map((agent) => agent.times.first_token ?? one.start_s);
            const done = computedTokens(one);
            return (
              <tr key={one.number} class={one === round ? "now" : ""} aria-current={one === round}>
                <th scope="row">
                  <button type="button" onClick={() => show(index)}>{one.number}</button>
                </th>
                <td>{one.agents.filter((agent) => !agent.neutral).length}</td>
                <td>{tokens(one.tokens.prompt)}</td>
                <td data-figure="computed">{tokens(done)}</td>
                <td data-figure="reused">{tokens(one.tokens.reused)}</td>
                <td data-figure="corrected">{tokens(one.tokens.corrected)}</td>
                <td data-figure="none">{tokens(promptTokens(one))}</td>
                <td data-figure="prefix">{one.tokens.prefix === null ? "…" : tokens(one.tokens.prefix)}</td>
                <td>{one.tokens.prefix === null ? "…" : times(one.tokens.prefix / done)}</td>
                <td>{seconds(Math.max(...firsts) - one.start_s)}</td>
                <td>{bytes(one.memory.dense)}</td>
                <td>{bytes(one.memory.resident)}</td>
                <td>{one.memory.stored === null ? "…" : bytes(one.memory.stored.memory)}</td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}
