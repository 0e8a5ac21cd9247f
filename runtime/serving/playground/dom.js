/** Elements, found and made. Text only ever becomes text: nothing here reads HTML. */

export const find = (id) => document.getElementById(id);

/** An element with these properties and children; a child is an element or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "class") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}
