// The algorithm, step by step, on the round that is shown.

import type { ComponentChildren } from "preact";
import type { Focus } from "./bars";
import { type Agent, count, ROLE, type Round, type RunDocument } from "./document";
import { plural, signed, tokens } from "./format";

export interface HowStep {
  title: string;
  text: ComponentChildren;
  focus: Focus;
}

/** The run of which most is read in a round, with those who read it. */
function mainRun(round: Round): { run: number; mirrors: Agent[] } | null {
  const read = new Map<number, number>();
  for (const agent of round.agents)
    for (const [start, stop, role, , run] of agent.pieces)
      if (role === ROLE.reused && run >= 0) read.set(run, (read.get(run) ?? 0) + stop - start);
  const most = [...read].sort((a, b) => b[1] - a[1])[0];
  if (most === undefined) return null;
  const [run] = most;
  const mirrors = round.agents.filter((agent) =>
    agent.pieces.some((piece) => piece[2] === ROLE.reused && piece[4] === run),
  );
  return { run, mirrors };
}

/** The steps; none where nothing is shared. */
export function howSteps(run: RunDocument, round: Round): HowStep[] {
  const main = mainRun(round);
  const mirror = main?.mirrors[0];
  if (main === null || mirror === undefined) return [];
  const inRun = (agent: Agent) => agent.pieces.filter((piece) => piece[4] === main.run);
  const segments = new Set(inRun(mirror).map((piece) => mirror.parts[piece[3]]?.[1] ?? -1));
  const source = run.runs.find((candidate) => candidate.run === main.run);
  const owner = round.agents.find((agent) =>
    agent.pieces.some((piece) => piece[4] === main.run && piece[2] === ROLE.owned),
  );
  const length = [...segments].reduce((sum, one) => sum + (run.segments[one]?.tokens ?? 0), 0);
  const first = (agent: Agent) => inRun(agent)[0]?.[0] ?? 0;
  const readers = owner === undefined ? main.mirrors : [owner, ...main.mirrors];
  const starts = readers.map(first);
  const offset = (agent: Agent) => inRun(agent).find((piece) => piece[2] === ROLE.reused)?.[5] ?? 0;
  const reused = count(inRun(mirror), ROLE.reused);
  const corrected = count(inRun(mirror), ROLE.corrected);
  const all = main.mirrors.reduce((sum, agent) => sum + count(inRun(agent), ROLE.reused), 0);
  const whole: Focus = { selection: null, segments };
  const of = (agent: Agent | undefined): Focus => ({
    selection: agent ? { row: round.agents.indexOf(agent), part: inRun(agent)[0]?.[3] ?? 0 } : null,
    segments,
  });
  const steps: (HowStep | null)[] = [
    {
      title: "Blocks are found",
      text: (
        <>
          {plural(segments.size, "block")} with {plural(length, "token")} stand in the prompts of{" "}
          {plural(readers.length, "agent")}. They begin anywhere from position{" "}
          {tokens(Math.min(...starts))} to {tokens(Math.max(...starts))}, behind different private
          text, so prefix caching cannot share them.
        </>
      ),
      focus: whole,
    },
    {
      title: "An owner is chosen",
      text: owner ? (
        <>
          <b>{owner.agent}</b> computes them, in one run, as part of its own prompt. The others read
          them in the same pass, or wait until they are there.
        </>
      ) : (
        <>
          They were computed by <b>{source?.agent ?? "an agent"}</b>
          {source && <> in round {source.round}</>}, and are still in memory. Nobody computes them
          again.
        </>
      ),
      focus: of(owner),
    },
    {
      title: "Queries are turned",
      text: (
        <>
          Keys carry the position at which their owner read them. <b>{mirror.agent}</b> reads them at
          offset {signed(offset(mirror))}: its queries are rotated by as much, and the keys stay where they
          lie. Nothing is copied.{" "}
          {main.mirrors.length > 1 && (
            <>
              Offsets here:{" "}
              {main.mirrors.slice(0, 12).map((agent) => `${agent.agent} ${signed(offset(agent))}`).join(", ")}
              {main.mirrors.length > 12 && " …"}
            </>
          )}
        </>
      ),
      focus: of(mirror),
    },
    corrected === 0
      ? null
      : {
          title: "Some tokens are corrected",
          text: (
            <>
              What a token means depends on what stands before it. <b>{mirror.agent}</b> computes{" "}
              {plural(corrected, "token")} of these blocks afresh, where that matters most (
              <code>{run.engine.correction ?? "correction"}</code>, the notches), and reads{" "}
              {tokens(reused)}.
            </>
          ),
          focus: of(mirror),
        },
    {
      title: "Results are merged",
      text: (
        <>
          Each agent attends to its own tokens and to the shared run separately; the two results are
          merged by their log-sum-exp, as if it were one cache. The run's keys are read once for all
          agents. {tokens(all)} tokens were not computed in this round because of this run.
        </>
      ),
      focus: whole,
    },
  ];
  return steps.filter((step) => step !== null);
}

interface Props {
  steps: HowStep[];
  at: number | null;
  go: (at: number | null) => void;
}

export function How({ steps, at, go }: Props) {
  if (steps.length === 0)
    return (
      <p>
        In this round nobody reads what another reads, too, so there is nothing to share. Agents
        hear each other from the second round on.
      </p>
    );
  const step = at === null ? undefined : steps[at];
  return (
    <div class="how">
      <ol>
        {steps.map(({ title }, index) => (
          <li key={title}>
            <button type="button" aria-pressed={at === index} onClick={() => go(at === index ? null : index)}>
              <span class="step">{index + 1}</span> {title}
            </button>
          </li>
        ))}
      </ol>
      <p aria-live="polite">
        {step?.text ?? "Choose a step: the bars above show what it means in this round."}
      </p>
    </div>
  );
}
