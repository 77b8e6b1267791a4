// The document of a run, as src/tokendance/view/document.py makes it, and what can be read off it.

export const ROLE = { prefix: 0, own: 1, owned: 2, reused: 3, corrected: 4, copied: 5 } as const;

/** start, stop, role, number of the part, run (-1: none), offset against the owner */
export type Piece = [number, number, number, number, number, number];
/** start, number of the segment, kind */
export type Part = [number, number, "shared" | "private" | "task"];
/** start, stop (seconds), prompt tokens, answer tokens */
export type Step = [number, number, number, number];

export interface Shadow {
  tokens: number;
  kl_next: number;
  kl: number;
  top1: number;
}

export interface Agent {
  agent: string;
  neutral: boolean;
  prompt: number;
  exact: number;
  computed: number;
  generated: number;
  parts: Part[];
  pieces: Piece[];
  times: {
    admitted: number | null;
    first_step: number | null;
    first_token: number | null;
    finished: number | null;
  };
  answer: string | null;
  finish_reason: string | null;
  error: string | null;
  shadow: Shadow | null;
}

export interface Round {
  number: number;
  start_s: number;
  stop_s: number | null;
  agents: Agent[];
  steps: Step[];
  memory: {
    dense: number;
    resident: number;
    stored: { memory: number; disk: number | null } | null;
  };
  tokens: {
    prompt: number;
    generated: number;
    computed: number;
    reused: number;
    corrected: number;
    approximate: number;
    none: number;
    prefix: number | null;
  };
}

export interface Segment {
  tokens: number;
  speaker: string | null;
  text: string | null;
}

export interface Run {
  run: number;
  round: number;
  agent: string;
  start: number;
  tokens: number;
}

export interface RunDocument {
  format: string;
  version: number;
  engine: {
    tokendance: string;
    model: string;
    dtype: string;
    reuse: string;
    correction: string | null;
    page_bytes: number;
    token_bytes: number;
  };
  has_text: boolean;
  dropped_rounds: number;
  first_round: number | null;
  lost_events: number;
  segments: Record<string, Segment>;
  runs: Run[];
  rounds: Round[];
}

/** Whether a role says that nothing is computed. */
export const isReused = (role: number): boolean =>
  role === ROLE.prefix || role === ROLE.reused || role === ROLE.copied;

/** The pieces of one part of a prompt. */
export const piecesOf = (agent: Agent, part: number): Piece[] =>
  agent.pieces.filter((piece) => piece[3] === part);

/** Position after the last token of a part. */
export const stopOf = (agent: Agent, part: number): number =>
  agent.parts[part + 1]?.[0] ?? agent.prompt;

/** Tokens of some roles in pieces. */
export const count = (pieces: Piece[], ...roles: number[]): number =>
  pieces.reduce((sum, [start, stop, role]) => sum + (roles.includes(role) ? stop - start : 0), 0);

/** Tokens of a round's prompts that are computed by now; while it runs, so many so far. */
export const computedTokens = (round: Round): number =>
  round.stop_s === null
    ? round.agents.reduce((sum, agent) => sum + agent.computed, 0)
    : round.tokens.computed;

/** What all agents would compute without any reuse. */
export const promptTokens = (round: Round): number =>
  round.stop_s === null ? round.tokens.prompt : round.tokens.none;

/** How many agents of a round read a segment. */
export const countReaders = (round: Round, segment: number): number =>
  round.agents.filter((agent) => agent.parts.some((part) => part[1] === segment)).length;

/** Of each segment: in which rounds its KV was read in place of being computed, and how often. */
type Reuses = Map<number, [round: number, times: number][]>;
const reuses = new WeakMap<RunDocument, Reuses>();

function reusesOf(run: RunDocument): Reuses {
  const known = reuses.get(run);
  if (known !== undefined) return known;
  const made: Reuses = new Map();
  for (const round of run.rounds) {
    const times = new Map<number, number>();
    for (const agent of round.agents) {
      const parts = new Set<number>();
      for (const piece of agent.pieces) if (isReused(piece[2])) parts.add(piece[3]);
      for (const part of parts) {
        const segment = agent.parts[part]?.[1] ?? -1;
        times.set(segment, (times.get(segment) ?? 0) + 1);
      }
    }
    for (const [segment, count] of times) {
      const list = made.get(segment) ?? [];
      list.push([round.number, count]);
      made.set(segment, list);
    }
  }
  reuses.set(run, made);
  return made;
}

/** How often a segment's KV was read in place of being computed, up to and with a round. */
export const timesReused = (run: RunDocument, segment: number, upTo: number): number =>
  (reusesOf(run).get(segment) ?? []).reduce(
    (sum, [round, times]) => sum + (round <= upTo ? times : 0),
    0,
  );

/** A run with what has changed since: rounds that are kept no more are gone, new ones are in. */
export function merged(run: RunDocument | null, change: RunDocument): RunDocument {
  if (run === null) return change;
  const first = change.first_round ?? Infinity;
  const rounds = new Map(run.rounds.map((round) => [round.number, round]));
  for (const round of change.rounds) rounds.set(round.number, round);
  const kept = [...rounds.values()].filter((round) => round.number >= first);
  kept.sort((a, b) => a.number - b.number);
  const segments: Record<string, Segment> = {};
  for (const round of kept)
    for (const agent of round.agents)
      for (const [, number] of agent.parts) {
        const segment = change.segments[number] ?? run.segments[number];
        if (segment !== undefined) segments[number] = segment;
      }
  const runs = new Map([...run.runs, ...change.runs].map((one) => [one.run, one]));
  return {
    ...change,
    rounds: kept,
    segments,
    runs: [...runs.values()].filter((one) => one.round >= first),
  };
}

export class BadDocument extends Error {}

/** Check the head of a document; the rest is as the version says. */
export function asRun(value: unknown): RunDocument {
  const run = value as RunDocument | null;
  if (typeof run !== "object" || run === null || run.format !== "tokendance-run")
    throw new BadDocument("This is no recorded run.");
  if (run.version !== 1)
    throw new BadDocument(`This page shows version 1 of runs, and this one is ${run.version}.`);
  return run;
}
