// Each agent's prompt as a bar to scale, drawn on a canvas; keys and screen readers have it as a
// slider over its parts.

import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import {
  answerColour,
  correctedColour,
  edgeColour,
  groundColour,
  isCorrected,
  type Palette,
  pieceColour,
} from "./colours";
import { type Agent, type Round, type RunDocument, stopOf } from "./document";
import { describe } from "./details";
import { seconds } from "./format";

export const BAR_HEIGHT = 24;

/** A part of an agent's prompt, or its answer (part -1). */
export interface Selection {
  /** Number of the agent in its round: names need not differ. */
  row: number;
  part: number;
}

export interface Focus {
  selection: Selection | null;
  /** Segments that are marked in all bars; null if none is. */
  segments: Set<number> | null;
}

interface BarProps {
  agent: Agent;
  row: number;
  scale: number;
  palette: Palette;
  focus: Focus;
}

/** The context of an empty canvas of a size; to set the size of one that has it takes longer. */
function cleared(canvas: HTMLCanvasElement, width: number, height: number) {
  const context = canvas.getContext("2d");
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  } else {
    context?.resetTransform();
    context?.clearRect(0, 0, width, height);
  }
  return context;
}

/** Paint a bar of which nothing is selected. */
function paint(canvas: HTMLCanvasElement, width: number, ratio: number, props: BarProps) {
  const { agent, scale, palette } = props;
  const context = cleared(canvas, Math.round(width * ratio), Math.round(BAR_HEIGHT * ratio));
  if (context === null) return;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const x = (position: number) => (position / scale) * width;
  for (const piece of agent.pieces) {
    const [start, stop] = piece;
    context.fillStyle = pieceColour(palette, agent, piece);
    context.fillRect(x(start), 0, Math.max(x(stop) - x(start), 0.5), BAR_HEIGHT);
    if (isCorrected(piece)) {
      // Computed afresh: a notch at the foot, whatever the colours are of.
      context.fillStyle = correctedColour(palette.dark);
      context.fillRect(x(start), BAR_HEIGHT - 7, Math.max(x(stop) - x(start), 1), 7);
    }
  }
  if (agent.generated > 0) {
    const [from, to] = [x(agent.prompt), x(agent.prompt + agent.generated)];
    context.fillStyle = answerColour(palette, agent);
    context.fillRect(from + 1, 0, Math.max(to - from - 1, 1), BAR_HEIGHT);
    context.fillStyle = groundColour(palette.dark);
    for (let at = from + 4; at < to - 1; at += 5) context.fillRect(at, 0, 1.5, BAR_HEIGHT);
  }
  context.fillStyle = groundColour(palette.dark);
  for (const [start] of agent.parts)
    if (start > 0) context.fillRect(x(start) - 0.5, 0, 1, BAR_HEIGHT);
}

/** Show a bar's picture; what is selected, strongly, and the rest faintly. */
function show(
  canvas: HTMLCanvasElement,
  picture: HTMLCanvasElement,
  width: number,
  ratio: number,
  { agent, row, scale, palette, focus }: BarProps,
) {
  const context = cleared(canvas, picture.width, picture.height);
  if (context === null) return;
  const { selection, segments } = focus;
  context.globalAlpha = segments === null ? 1 : 0.25;
  context.drawImage(picture, 0, 0);
  context.globalAlpha = 1;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.strokeStyle = edgeColour(palette.dark);
  context.lineWidth = 2;
  const x = (position: number) => (position / scale) * width;
  const outline = (from: number, to: number) =>
    context.strokeRect(from + 1, 1, Math.max(to - from - 2, 1), BAR_HEIGHT - 2);
  agent.parts.forEach(([start, segment], part) => {
    const [from, to] = [x(start), x(stopOf(agent, part))];
    const isMarked = segments?.has(segment) ?? false;
    if (isMarked) {
      const [size, height] = [to - from, BAR_HEIGHT];
      const [left, wide] = [from * ratio, size * ratio]; // in the picture
      context.clearRect(from, 0, size, height);
      context.drawImage(picture, left, 0, wide, picture.height, from, 0, size, height);
    }
    const isOwn = selection?.row === row && selection.part === part;
    if (selection !== null && (isMarked || isOwn)) outline(from, to);
  });
  if (selection?.row === row && selection.part === -1)
    outline(x(agent.prompt), x(agent.prompt + agent.generated));
}

function Bar(props: BarProps & { width: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const picture = useRef<HTMLCanvasElement>(null);
  const { agent, scale, palette, focus, width } = props;
  const ratio = window.devicePixelRatio || 1;
  // To point at something changes all bars, but not their pictures.
  useLayoutEffect(() => {
    picture.current ??= document.createElement("canvas");
    paint(picture.current, width, ratio, props);
  }, [agent, scale, palette, width, ratio]);
  useLayoutEffect(() => {
    if (canvas.current && picture.current && width > 0)
      show(canvas.current, picture.current, width, ratio, props);
  }, [agent, scale, palette, width, ratio, focus]);
  return <canvas ref={canvas} aria-hidden="true" height={BAR_HEIGHT} />;
}

export interface BarsProps {
  run: RunDocument;
  round: Round;
  palette: Palette;
  focus: Focus;
  select: (selection: Selection | null, pinned: boolean) => void;
}

/** The part at a position of a bar; -1 for the answer. */
function partAt(agent: Agent, position: number): number {
  if (position >= agent.prompt) return -1;
  let part = 0;
  while (part + 1 < agent.parts.length && (agent.parts[part + 1]?.[0] ?? 0) <= position) part += 1;
  return part;
}

export function Bars({ run, round, palette, focus, select }: BarsProps) {
  const list = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const track = list.current?.querySelector(".bar");
    if (!track) return;
    const observer = new ResizeObserver(() => setWidth(track.clientWidth));
    observer.observe(track);
    setWidth(track.clientWidth);
    return () => observer.disconnect();
  }, [round.agents.length === 0]);
  const agents = round.agents;
  const scale = Math.max(1, ...agents.map((agent) => agent.prompt + agent.generated));

  const move = (event: KeyboardEvent, row: number, agent: Agent) => {
    const steps = agent.parts.length + (agent.generated > 0 ? 1 : 0);
    const here = focus.selection?.row === row ? focus.selection.part : 0;
    const at = here === -1 ? agent.parts.length : here;
    const to: Record<string, number> = {
      ArrowRight: Math.min(at + 1, steps - 1),
      ArrowLeft: Math.max(at - 1, 0),
      Home: 0,
      End: steps - 1,
    };
    const next = to[event.key];
    if (next !== undefined) {
      select({ row, part: next === agent.parts.length ? -1 : next }, true);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const next = row + (event.key === "ArrowDown" ? 1 : -1);
      list.current?.querySelectorAll<HTMLElement>(".bar")[next]?.focus();
    } else if (event.key === "Escape") {
      select(null, true);
    } else return;
    event.preventDefault();
  };

  const point = (event: PointerEvent, row: number, agent: Agent, pinned: boolean) => {
    const box = (event.currentTarget as HTMLElement).getBoundingClientRect();
    const position = ((event.clientX - box.left) / box.width) * scale;
    if (position < agent.prompt + agent.generated)
      select({ row, part: partAt(agent, position) }, pinned);
  };

  return (
    <div class="bars" ref={list}>
      {agents.map((agent, row) => (
        <Row
          key={row}
          part={focus.selection?.row === row ? focus.selection.part : null}
          {...{ run, round, agent, row, scale, palette, focus, width, select, point, move }}
        />
      ))}
    </div>
  );
}

interface RowProps extends BarsProps {
  agent: Agent;
  scale: number;
  width: number;
  /** What is selected of this agent; null for nothing. */
  part: number | null;
  row: number;
  move: (event: KeyboardEvent, row: number, agent: Agent) => void;
  point: (event: PointerEvent, row: number, agent: Agent, pinned: boolean) => void;
}

function Row({ run, round, agent, row, scale, palette, focus, width, part, select, move, point }: RowProps) {
  const said = useMemo(
    () => (agent.pieces.length === 0 ? (agent.error ?? "failed") : describe(run, round, agent, part ?? 0)),
    [run, round, agent, part],
  );
  const { first_token } = agent.times;
  return (
    <div class={`row${part !== null ? " selected" : ""}`}>
      <span class="name" title={agent.agent}>
        {agent.agent}
      </span>
      <div
        class="bar"
        role="slider"
        tabIndex={0}
        aria-label={`Prompt of ${agent.agent}`}
        aria-valuemin={1}
        aria-valuemax={agent.parts.length + (agent.generated > 0 ? 1 : 0)}
        aria-valuenow={part === -1 ? agent.parts.length + 1 : (part ?? 0) + 1}
        aria-valuetext={said}
        onKeyDown={(event) => move(event, row, agent)}
        onFocus={() => part !== null || select({ row, part: 0 }, true)}
        onPointerMove={(event) => event.pointerType === "mouse" && point(event, row, agent, false)}
        onPointerLeave={() => select(null, false)}
        onPointerDown={(event) => point(event, row, agent, true)}
      >
        <Bar {...{ agent, row, scale, palette, focus, width }} />
      </div>
      <span class="figure">
        {agent.error !== null ? (
          <strong class="failed">failed</strong>
        ) : (
          seconds(first_token === null ? null : first_token - round.start_s)
        )}
      </span>
    </div>
  );
}
