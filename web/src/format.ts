// Numbers as people read them.

const whole = new Intl.NumberFormat("en");

export const tokens = (value: number): string => whole.format(value);

export function bytes(value: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${units[unit]}`;
}

export const seconds = (value: number | null): string =>
  value === null ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;

export const times = (value: number): string =>
  Number.isFinite(value) ? `${value.toFixed(value < 10 ? 1 : 0)}×` : "–";

export const percent = (part: number, all: number): string =>
  all === 0 ? "–" : `${Math.round((100 * part) / all)}%`;

export const signed = (value: number): string => (value > 0 ? `+${value}` : `${value}`);

export const plural = (count: number, noun: string): string =>
  `${tokens(count)} ${noun}${count === 1 ? "" : "s"}`;
