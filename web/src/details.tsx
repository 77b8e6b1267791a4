// What is known of the part that is pointed at.

import type { Selection } from "./bars";
import {
  type Agent,
  count,
  countReaders,
  isReused,
  piecesOf,
  ROLE,
  type Round,
  type RunDocument,
  stopOf,
  timesReused,
} from "./document";
import { bytes, plural, signed, tokens } from "./format";

const KINDS = { shared: "Shared text", private: "Private text", task: "Task" };

interface Facts {
  title: string;
  rows: [string, string][];
  text: string | null;
}

function answerFacts(run: RunDocument, agent: Agent): Facts {
  return {
    title: "Answer",
    rows: [
      ["Tokens", tokens(agent.generated)],
      ["At", `${tokens(agent.prompt)} to ${tokens(agent.prompt + agent.generated)}`],
      ["KV", bytes(agent.generated * run.engine.token_bytes)],
      ...shadowRows(agent),
    ],
    text: agent.answer,
  };
}

function shadowRows(agent: Agent): [string, string][] {
  if (agent.shadow === null) return [];
  const { kl, kl_next, tokens: compared } = agent.shadow;
  return [
    ["Against exact", `KL ${kl.toFixed(4)} nats (next token ${kl_next.toFixed(4)}, ${compared} compared)`],
  ];
}

function partFacts(run: RunDocument, round: Round, agent: Agent, number: number): Facts | null {
  const part = agent.parts[number];
  if (part === undefined) return null;
  const [start, segmentNumber, kind] = part;
  const segment = run.segments[segmentNumber];
  const stop = stopOf(agent, number);
  const pieces = piecesOf(agent, number);
  const owned = count(pieces, ROLE.owned);
  const own = count(pieces, ROLE.own);
  const corrected = count(pieces, ROLE.corrected);
  const kept = count(pieces, ROLE.prefix);
  const reused = count(pieces, ROLE.reused, ROLE.copied);
  const how = [
    owned > 0 && `${tokens(owned)} computed here, for all`,
    own > 0 && `${tokens(own)} computed`,
    reused > 0 && `${tokens(reused)} read where they lie`,
    corrected > 0 && `${tokens(corrected)} corrected`,
    kept > 0 && `${tokens(kept)} kept from an equal beginning`,
  ].filter((text) => typeof text === "string");
  const rows: [string, string][] = [
    ["Tokens", tokens(stop - start)],
    ["At", `${tokens(start)} to ${tokens(stop)}`],
    ["KV", bytes((stop - start) * run.engine.token_bytes)],
    ["How", how.join(", ")],
  ];
  const read = pieces.find((piece) => piece[2] === ROLE.reused || piece[2] === ROLE.corrected);
  const runNumber = pieces.find((piece) => piece[4] >= 0)?.[4];
  const source = run.runs.find((candidate) => candidate.run === runNumber);
  if (kind === "shared") {
    if (segment?.speaker) rows.push(["Said by", segment.speaker]);
    if (source !== undefined) {
      const when = source.round === round.number ? "" : `, in round ${source.round}`;
      rows.push(["Owner", `${source.agent}${when} (run ${source.run})`]);
    }
    if (read !== undefined) rows.push(["Offset", signed(read[5])]);
    const readers = countReaders(round, segmentNumber);
    rows.push(["Read by", `${plural(readers, "agent")} in this round`]);
    rows.push(["Reused", `${plural(timesReused(run, segmentNumber, round.number), "time")} so far`]);
  }
  if (pieces.some((piece) => isReused(piece[2]))) {
    const approximate = pieces.some((piece) => isReused(piece[2]) && piece[1] > agent.exact);
    rows.push(["Result", approximate ? "approximate: KV of another context" : "exact"]);
    rows.push(...shadowRows(agent));
  }
  return { title: KINDS[kind], rows, text: segment?.text ?? null };
}

function factsOf(run: RunDocument, round: Round, agent: Agent, part: number): Facts | null {
  return part === -1 ? answerFacts(run, agent) : partFacts(run, round, agent, part);
}

/** The same in one sentence, for screen readers. */
export function describe(run: RunDocument, round: Round, agent: Agent, part: number): string {
  const facts = factsOf(run, round, agent, part);
  if (facts === null) return "nothing";
  return `${facts.title}. ${facts.rows.map(([name, value]) => `${name}: ${value}`).join(". ")}`;
}

interface Props {
  run: RunDocument;
  round: Round;
  selection: Selection | null;
}

export function Details({ run, round, selection }: Props) {
  const agent = selection === null ? undefined : round.agents[selection.row];
  const facts =
    agent === undefined || selection === null
      ? null
      : agent.error !== null
        ? { title: "Failed", rows: [], text: agent.error }
        : factsOf(run, round, agent, selection.part);
  if (facts === null || agent === undefined)
    return (
      <aside class="details empty" aria-label="Details">
        <p>Point at a bar, tap it, or reach it with Tab and move with the arrow keys: what it is, who owns it, and its text stand here.</p>
      </aside>
    );
  return (
    <aside class="details" aria-label="Details">
      <h3>
        {facts.title} <small>in the prompt of {agent.agent}</small>
      </h3>
      <dl>
        {facts.rows.map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
      {facts.text !== null && <blockquote>{facts.text.trim() || "(no visible text)"}</blockquote>}
      {facts.text === null && !run.has_text && <p class="quiet">This recording has no text.</p>}
    </aside>
  );
}
