// Colours of bars: a hue says whose text it is, strength says whether it was computed or reused.

import { type Agent, isReused, type Piece, ROLE, type RunDocument } from "./document";

export type ColourBy = "run" | "agent" | "exact";

// Hues that differ for most eyes, warm and cold by turns; then the golden angle goes on.
const HUES = [212, 28, 150, 275, 48, 188, 330, 95, 245, 8];
const hueAt = (index: number): number => HUES[index] ?? (index * 137.5) % 360;

export interface Palette {
  dark: boolean;
  by: ColourBy;
  run: RunDocument;
  hueOfRun: Map<number, number>;
  hueOfAgent: Map<string, number>;
}

export function makePalette(run: RunDocument, by: ColourBy, dark: boolean): Palette {
  const hueOfRun = new Map<number, number>();
  const hueOfAgent = new Map<string, number>();
  for (const round of run.rounds)
    for (const agent of round.agents) {
      if (!hueOfAgent.has(agent.agent)) hueOfAgent.set(agent.agent, hueAt(hueOfAgent.size));
      for (const piece of agent.pieces)
        if (piece[4] >= 0 && !hueOfRun.has(piece[4])) hueOfRun.set(piece[4], hueAt(hueOfRun.size));
    }
  return { dark, by, run, hueOfRun, hueOfAgent };
}

/** How strong a colour is: computed text is full, reused text is pale. */
function paint(dark: boolean, hue: number, saturation: number, pale: boolean, odd: boolean) {
  const step = odd ? (dark ? 5 : -5) : 0;
  const lightness = pale ? (dark ? 29 : 82) + step : (dark ? 62 : 45) + step;
  return `hsl(${hue} ${pale ? saturation * 0.75 : saturation}% ${lightness}%)`;
}

export function pieceColour(palette: Palette, agent: Agent, piece: Piece): string {
  const [start, , role, partNumber, run] = piece;
  const pale = isReused(role);
  const part = agent.parts[partNumber];
  const odd = partNumber % 2 === 1;
  if (palette.by === "exact") {
    const approximate = pale && start >= agent.exact;
    return paint(palette.dark, approximate ? 32 : 172, approximate ? 85 : 45, pale, false);
  }
  if (palette.by === "agent") {
    const speaker = part?.[2] === "shared" ? palette.run.segments[part[1]]?.speaker : agent.agent;
    const hue = speaker == null ? undefined : palette.hueOfAgent.get(speaker);
    if (hue !== undefined) return paint(palette.dark, hue, 62, pale, false);
    return paint(palette.dark, 220, 6, pale, odd);
  }
  const hue = run >= 0 && part?.[2] === "shared" ? palette.hueOfRun.get(run) : undefined;
  if (hue !== undefined) return paint(palette.dark, hue, 65, pale, odd);
  return paint(palette.dark, 220, 7, pale, part?.[2] === "task");
}

export function answerColour(palette: Palette, agent: Agent): string {
  if (palette.by === "agent")
    return paint(palette.dark, palette.hueOfAgent.get(agent.agent) ?? 220, 62, false, false);
  return paint(palette.dark, 150, 50, false, false);
}

/** Where a reader computes cached tokens afresh. */
export const correctedColour = (dark: boolean): string => (dark ? "#ff8a5c" : "#c2410c");
export const edgeColour = (dark: boolean): string => (dark ? "#f4f4f5" : "#18181b");
export const groundColour = (dark: boolean): string => (dark ? "#18181b" : "#ffffff");
export const isCorrected = (piece: Piece): boolean => piece[2] === ROLE.corrected;
