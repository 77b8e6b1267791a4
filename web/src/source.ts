// Where the run comes from: the page itself, a file beside it, or events of a server.

import { asRun, merged, type RunDocument } from "./document";

export interface Listener {
  onRun: (run: RunDocument) => void;
  onProblem: (sentence: string) => void;
}

export function listen({ onRun, onProblem }: Listener): void {
  const embedded = document.getElementById("run");
  const source = document.querySelector<HTMLMetaElement>('meta[name="tokendance-source"]')?.content;
  let run: RunDocument | null = null;
  const take = (text: string) => {
    try {
      run = merged(run, asRun(JSON.parse(text)));
      onRun(run);
    } catch (error) {
      onProblem(`The run cannot be shown: ${error instanceof Error ? error.message : error}`);
    }
  };
  if (embedded?.textContent) take(embedded.textContent);
  else if (source === undefined) onProblem("This page has no run in it.");
  else if (source.endsWith("events")) {
    const events = new EventSource(source);
    events.onopen = () => {
      run = null; // a server tells all from the start to whoever comes anew
    };
    events.onmessage = (event: MessageEvent<string>) => take(event.data);
    events.onerror = () => {
      if (run?.rounds.every((round) => round.stop_s !== null)) return; // a run that is over
      onProblem("The server does not answer now; the page tries again.");
    };
  } else
    fetch(source)
      .then(async (answer) =>
        answer.ok ? take(await answer.text()) : onProblem(`The server answers ${answer.status}.`),
      )
      .catch(() => onProblem("The server does not answer. Start it again, then load this page."));
}
