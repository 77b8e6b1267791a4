import { render } from "preact";
import { App } from "./app";
import "./view.css";

const root = document.getElementById("view");
if (root !== null) render(<App />, root);
