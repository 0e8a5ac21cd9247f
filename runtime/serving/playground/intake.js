/** How images come in: chosen, pasted or dropped; and in words, why one did not. */

import { find, make } from "./dom.js";
import { readImage, Refused } from "./images.js";
import { counted } from "./words.js";

export class Intake {
  /**
   * @param {function} state gives the server's `limits`, if they are known, and the `number` of images there are.
   * @param {function} add called with each image that can be sent.
   */
  constructor(state, add) {
    this.state = state;
    this.add = add;
    for (const id of ["choose", "attach"]) find(id).addEventListener("click", () => find("file").click());
    find("file").addEventListener("change", (event) => {
      const files = [...event.target.files];
      // So that the same file can be chosen again.
      event.target.value = "";
      this.take(files);
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length) return;
      event.preventDefault();
      this.take(files);
    });
    this.takeDropped();
  }

  takeDropped() {
    let depth = 0; // of elements that a dragged file is over
    const on = (type, listener) =>
      document.addEventListener(type, (event) => {
        const isOurs = ["Files", "text/uri-list"].some((kind) => event.dataTransfer?.types.includes(kind));
        if (isOurs) listener(event);
      });
    const show = () => document.body.classList.toggle("dropping", depth > 0);
    on("dragenter", () => {
      depth += 1;
      show();
    });
    on("dragleave", () => {
      depth -= 1;
      show();
    });
    on("dragover", (event) => event.preventDefault());
    on("drop", (event) => {
      event.preventDefault();
      depth = 0;
      show();
      const files = [...event.dataTransfer.files];
      if (files.length) return this.take(files);
      const message = "That is the address of an image, and this page loads nothing from elsewhere.";
      this.note(`${message} Save the image, and drop the file.`);
    });
  }

  /** Files of the user; what was said of earlier ones goes. */
  async take(files) {
    this.clear();
    for (const file of files) await this.takeOne(file);
  }

  async takeOne(file) {
    const { limits, number } = this.state();
    if (!limits) return this.note("The server has not said yet which images it takes.");
    if (number >= limits.images) {
      const most = counted(limits.images, "image");
      const message = `${file.name} was not added: the server takes ${most} in one conversation.`;
      return this.note(`${message} Remove one, or start over.`);
    }
    try {
      this.add(await readImage(file, limits));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.note(error.message, error.remedy);
    }
  }

  /** Say something about an image, with a way out of it where there is one. */
  note(message, remedy = null) {
    const line = make("p", { class: "note" }, make("span", {}, message));
    if (remedy) {
      const button = make("button", { type: "button", class: "quiet" }, remedy.label);
      button.addEventListener("click", async () => {
        button.disabled = true;
        try {
          const file = await remedy.run();
          line.remove();
          await this.takeOne(file);
        } catch (error) {
          if (!(error instanceof Refused)) throw error;
          line.replaceChildren(error.message);
        }
      });
      line.append(button);
    }
    const close = make("button", { type: "button", class: "remove", "aria-label": "Dismiss" }, "×");
    close.addEventListener("click", () => line.remove());
    line.append(close);
    find("notices").append(line);
  }

  /** Nothing more is to be said. */
  clear() {
    find("notices").replaceChildren();
  }
}
