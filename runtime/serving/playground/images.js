/** Files that become images of the conversation: checked against what the server takes, in words where it does not. */

import { megabytes, megapixels } from "./words.js";

// The longest side of the copy that is drawn: eight photographs in full size would take a gigabyte.
const PREVIEW_PIXELS = 1600;
// More than a canvas holds on some phones.
const CANVAS_PIXELS = 16_000_000;
const JPEG_QUALITY = 0.92;
const SIGNATURES = [
  ["JPEG", /^\xff\xd8\xff/],
  ["PNG", /^\x89PNG/],
  ["GIF", /^GIF8/],
  ["BMP", /^BM/],
  ["WEBP", /^RIFF[^]{4}WEBP/],
  ["AVIF", /^[^]{4}ftypavi[fs]/],
  ["HEIC", /^[^]{4}ftyp(hei|hev|mif1|msf1)/],
  ["TIFF", /^(II\*\0|MM\0\*)/],
  ["SVG", /^(\xef\xbb\xbf)?\s*<(\?xml|svg|!)/],
];

/** A file that is not taken, and why. */
export class Refused extends Error {
  /**
   * @param {string} message for people.
   * @param {object} [remedy] `label` of a button, and `run`, which gives a file that would be taken.
   */
  constructor(message, remedy = null) {
    super(message);
    this.remedy = remedy;
  }
}

/**
 * An image of a file.
 *
 * @param {File} file of a user.
 * @param {object} limits of the server, from its model's card.
 * @returns `name`, `blob`, `width` and `height` of the upright image, and `preview`, a canvas of it that may be smaller.
 */
export async function readImage(file, limits) {
  let blob;
  try {
    // A copy: the file may change or vanish before it is sent.
    blob = new Blob([await file.arrayBuffer()]);
  } catch {
    throw new Refused(`${file.name} cannot be read.`);
  }
  const head = String.fromCharCode(...new Uint8Array(await blob.slice(0, 64).arrayBuffer()));
  const format = SIGNATURES.find(([, signature]) => signature.test(head))?.[0];
  const element = await decode(format === "SVG" ? new Blob([blob], { type: "image/svg+xml" }) : blob);
  const { naturalWidth: width, naturalHeight: height } = element ?? {};
  if (!width || !height) throw new Refused(`${file.name} is not an image that this browser can show, or it is damaged.`);

  const copying = (label) => ({ label, run: () => copyOf(element, file.name, limits) });
  if (!limits.image_formats.includes(format)) {
    const known = limits.image_formats.join(", ");
    const kind = format ?? (file.type || "of an unknown format");
    throw new Refused(`${file.name} is ${kind}; the server takes ${known}.`, copying("Convert it to JPEG"));
  }
  if (width * height > limits.image_pixels) {
    const message = `${file.name} has ${width} × ${height} pixels, ${megapixels(width * height)}`;
    throw new Refused(`${message}; the server takes ${megapixels(limits.image_pixels)}.`, copying("Scale it down"));
  }
  if (blob.size > limits.image_bytes) {
    const message = `${file.name} has ${megabytes(blob.size)}; the server takes ${megabytes(limits.image_bytes)}.`;
    throw new Refused(message, copying("Make it smaller"));
  }
  return { name: file.name, blob, width, height, preview: drawn(element, PREVIEW_PIXELS / Math.max(width, height)) };
}

/** The image as a `data:` URI. */
export function toDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** A small copy for lists. */
export function thumbnail(image, side) {
  const { preview } = image;
  const scale = Math.max(side / preview.width, side / preview.height);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const [width, height] = [preview.width * scale, preview.height * scale];
  canvas.getContext("2d").drawImage(preview, (side - width) / 2, (side - height) / 2, width, height);
  return canvas;
}

/** An element whose size is that of the upright image; null for what is not an image. */
function decode(blob) {
  const address = URL.createObjectURL(blob);
  return new Promise((resolve) => {
    const element = new Image();
    element.onload = () => resolve(element);
    element.onerror = () => resolve(null);
    element.src = address;
  }).finally(() => URL.revokeObjectURL(address));
}

/** A JPEG file of what the element shows, small enough for the server. */
async function copyOf(element, name, limits) {
  const { naturalWidth: width, naturalHeight: height } = element;
  let scale = Math.min(1, Math.sqrt(Math.min(limits.image_pixels, CANVAS_PIXELS) / (width * height)));
  for (; scale * Math.min(width, height) >= 2; scale *= 0.7) {
    const canvas = drawn(element, scale, "white");
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
    if (!blob) break;
    if (blob.size <= limits.image_bytes) return new File([blob], name.replace(/\.\w+$/, "") + ".jpg");
  }
  throw new Refused(`This browser cannot make a smaller copy of ${name}.`);
}

function drawn(element, scale, ground = null) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(element.naturalWidth * Math.min(1, scale)));
  canvas.height = Math.max(1, Math.round(element.naturalHeight * Math.min(1, scale)));
  const context = canvas.getContext("2d");
  if (ground) {
    context.fillStyle = ground;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.imageSmoothingQuality = "high";
  context.drawImage(element, 0, 0, canvas.width, canvas.height);
  return canvas;
}
