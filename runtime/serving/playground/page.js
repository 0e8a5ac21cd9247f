"use strict";

const answer = document.getElementById("answer");

function readImage(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function ask(question, file) {
  const content = [{ type: "text", text: question }];
  if (file) content.push({ type: "image_url", image_url: { url: await readImage(file) } });
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ messages: [{ role: "user", content }] }),
  });
  const body = await response.json();
  if (body.error) throw new Error(body.error.message);
  return body.choices[0].message.content;
}

document.getElementById("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  answer.textContent = "…";
  try {
    answer.textContent = await ask(document.getElementById("question").value, document.getElementById("image").files[0]);
  } catch (error) {
    answer.textContent = error.message;
  }
});
