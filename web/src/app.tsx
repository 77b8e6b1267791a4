import { useCallback, useEffect, useMemo, useState } from "preact/hooks";
import { Bars, type Focus, type Selection } from "./bars";
import { Memory, RoundTable, TimeLine, Work } from "./charts";
import { type ColourBy, makePalette } from "./colours";
import { Details } from "./details";
import type { RunDocument } from "./document";
import { plural } from "./format";
import { How, howSteps } from "./how";
import { listen } from "./source";

const COLOURS: [ColourBy, string, string][] = [
  ["agent", "by agent", "One colour for each agent: what it said last time is in everybody's prompt."],
  ["run", "by run", "One colour for each run: text that one agent computes and all others read."],
  ["exact", "exact or not", "Green is exact. Amber was computed in another agent's context: near, not equal."],
];

function useDark(): boolean {
  const query = useMemo(() => window.matchMedia("(prefers-color-scheme: dark)"), []);
  const [dark, setDark] = useState(query.matches);
  useEffect(() => {
    const change = () => setDark(query.matches);
    query.addEventListener("change", change);
    return () => query.removeEventListener("change", change);
  }, [query]);
  return dark;
}

export function App() {
  const [run, setRun] = useState<RunDocument | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(
    () =>
      listen({
        onRun: (next) => {
          setRun(next);
          setProblem(null);
        },
        onProblem: setProblem,
      }),
    [],
  );
  return (
    <main>
      <header>
        <h1>TokenDance</h1>
        {run !== null && (
          <p>
            {run.engine.model}, {run.engine.dtype}, reuse {run.engine.reuse}
            {run.engine.correction !== null && <>, correction {run.engine.correction}</>}
          </p>
        )}
      </header>
      {problem !== null && <p role="alert" class="problem">{problem}</p>}
      {run === null ? (
        problem === null && <p>Loading …</p>
      ) : run.rounds.length === 0 ? (
        <p>No round has begun yet.</p>
      ) : (
        <Shown run={run} />
      )}
    </main>
  );
}

function Shown({ run }: { run: RunDocument }) {
  // A run that grows is followed, unless somebody looks at an earlier round.
  const [chosen, setChosen] = useState<number | null>(() => firstWithSharing(run));
  const [by, setBy] = useState<ColourBy>("agent");
  const [pinned, setPinned] = useState<Selection | null>(null);
  const [hovered, setHovered] = useState<Selection | null>(null);
  const [step, setStep] = useState<number | null>(null);
  const dark = useDark();
  const index = Math.min(chosen ?? run.rounds.length - 1, run.rounds.length - 1);
  const round = run.rounds[index];
  const palette = useMemo(() => makePalette(run, by, dark), [run, by, dark]);
  const steps = useMemo(() => (round ? howSteps(run, round) : []), [run, round]);
  const show = useCallback(
    (at: number) => {
      setChosen(at === run.rounds.length - 1 ? null : at);
      setHovered(null);
    },
    [run],
  );
  const select = useCallback((selection: Selection | null, pin: boolean) => {
    if (pin) {
      setPinned(selection);
      setStep(null);
    }
    // A pointer that moves within a part changes nothing.
    setHovered((before) =>
      pin ? null : before?.row === selection?.row && before?.part === selection?.part ? before : selection,
    );
  }, []);
  const selection = hovered ?? pinned;
  const focus = useMemo<Focus>(() => {
    const stepFocus = step === null ? undefined : steps[step]?.focus;
    if (hovered === null && stepFocus !== undefined) return stepFocus;
    const part = selection === null ? undefined : round?.agents[selection.row]?.parts[selection.part];
    const segments = part?.[2] === "shared" ? new Set([part[1]]) : null;
    return { selection, segments };
  }, [round, selection?.row, selection?.part, step, steps, hovered === null]);
  if (round === undefined) return null;
  const last = run.rounds.length - 1;
  return (
    <>
      <nav class="rounds" aria-label="Rounds">
        <button type="button" disabled={index === 0} onClick={() => show(index - 1)} aria-label="Round before">
          ‹
        </button>
        <label>
          <span>
            Round <b>{round.number}</b> of {run.rounds[last]?.number}
            {round.stop_s === null && <em> – running</em>}
          </span>
          <input
            type="range"
            min={0}
            max={last}
            value={index}
            aria-valuetext={`Round ${round.number}`}
            onInput={(event) => show(Number(event.currentTarget.value))}
          />
        </label>
        <button type="button" disabled={index === last} onClick={() => show(index + 1)} aria-label="Next round">
          ›
        </button>
      </nav>
      {run.dropped_rounds > 0 && (
        <p class="quiet">{plural(run.dropped_rounds, "earlier round")} had to make room and cannot be shown.</p>
      )}
      {run.lost_events > 0 && (
        <p class="quiet">{plural(run.lost_events, "event")} came too fast to be recorded: some figures are too small.</p>
      )}

      <Work round={round} />

      <section aria-labelledby="who">
        <h2 id="who">Who reads what</h2>
        <div class="controls">
          <fieldset>
            <legend>Colour</legend>
            {COLOURS.map(([value, name]) => (
              <label key={value}>
                <input type="radio" name="by" checked={by === value} onChange={() => setBy(value)} /> {name}
              </label>
            ))}
          </fieldset>
          <p class="quiet">{COLOURS.find(([value]) => value === by)?.[2]}</p>
        </div>
        <ul class="legend" aria-label="Legend">
          <li><i class="swatch full" /> computed in this round</li>
          <li><i class="swatch pale" /> reused: read where it lies</li>
          <li><i class="swatch notch" /> corrected: read by others, computed afresh here</li>
          {by === "run" && <li><i class="swatch private" /> private text and task</li>}
          <li><i class="swatch answer" /> answer</li>
        </ul>
        <div class="split">
          <div>
            <div class="row head" aria-hidden="true">
              <span class="name">Agent</span>
              <span>Prompt, to scale</span>
              <span class="figure">First token</span>
            </div>
            <Bars {...{ run, round, palette, focus, select }} />
          </div>
          <Details {...{ run, round }} selection={focus.selection} />
        </div>
      </section>

      <section aria-labelledby="how">
        <h2 id="how">How it works, on this round</h2>
        <How steps={steps} at={step} go={setStep} />
      </section>

      <div class="pair">
        <section aria-labelledby="time">
          <h2 id="time">Time</h2>
          <ul class="legend">
            <li><i class="key waiting" /> waiting</li>
            <li><i class="key owner" /> prefill, owner</li>
            <li><i class="key mirror" /> prefill</li>
            <li><i class="key decode" /> decode</li>
          </ul>
          <TimeLine round={round} />
        </section>
        <section aria-labelledby="memory">
          <h2 id="memory">KV memory over rounds</h2>
          <Memory run={run} round={round} />
        </section>
      </div>

      <section aria-labelledby="all">
        <h2 id="all">All rounds</h2>
        <RoundTable run={run} round={round} show={show} />
      </section>
    </>
  );
}

/** Where to begin: the first round in which anything is shared; null is the last. */
function firstWithSharing(run: RunDocument): number | null {
  const live = run.rounds.some((round) => round.stop_s === null);
  const at = run.rounds.findIndex((round) => round.tokens.approximate > 0);
  return live || at === -1 || at === run.rounds.length - 1 ? null : at;
}
