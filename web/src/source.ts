// Where the run comes from: the page itself, a file beside it, or events of a server.

import { asRun, type RunDocument } from "./document";

export interface Listener {
  onRun: (run: RunDocument) => void;
  onProblem: (sentence: string) => void;
}

export function listen({ onRun, onProblem }: Listener): void {
  const embedded = document.getElementById("run");
  const source = document.querySelector<HTMLMetaElement>('meta[name="tokendance-source"]')?.content;
  const take = (text: string) => {
    try {
      onRun(asRun(JSON.parse(text)));
    } catch (error) {
      onProblem(`The run cannot be shown: ${error instanceof Error ? error.message : error}`);
    }
  };
  if (embedded?.textContent) take(embedded.textContent);
  else if (source === undefined) onProblem("This page has no run in it.");
  else if (source === "events") {
    const events = new EventSource(source);
    events.onmessage = (event: MessageEvent<string>) => take(event.data);
    events.onerror = () => onProblem("The server does not answer; the page tries again.");
  } else
    fetch(source)
      .then(async (answer) =>
        answer.ok ? take(await answer.text()) : onProblem(`The server answers ${answer.status}.`),
      )
      .catch(() => onProblem("The server does not answer. Start it again, then load this page."));
}
