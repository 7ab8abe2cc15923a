// What /openapi.json says, to be read; nothing is loaded from elsewhere.

import { $, ask, element } from "./api.js";

const described = await ask("openapi.json");
const groups = {};
for (const [path, methods] of Object.entries(described.paths)) {
  for (const [method, route] of Object.entries(methods)) (groups[route.tags?.[0] ?? "other"] ??= []).push({ path, method, route });
}

const named = (schema) => (schema?.$ref ? described.components.schemas[schema.$ref.split("/").at(-1)] : schema);

function kind(schema) {
  const found = named(schema);
  if (!found) return "";
  if (found.anyOf) return found.anyOf.filter((each) => each.type !== "null").map(kind).join(" or ");
  if (found.enum) return found.enum.join(", ");
  if (found.type === "array") return `list of ${kind(found.items) || "values"}`;
  return found.format === "binary" ? "file" : found.type ?? "";
}

function fields(route) {
  const body = named(Object.values(route.requestBody?.content ?? {})[0]?.schema);
  const found = Object.entries(body?.properties ?? {}).map(([name, schema]) => ({ name, schema, needed: body.required?.includes(name) }));
  found.push(...(route.parameters ?? []).map((each) => ({ name: each.name, schema: each.schema, needed: each.required })));
  if (!found.length) return [];
  const cell = (text) => element("td", { textContent: text });
  return [element("table", {}, ...found.map(({ name, schema, needed }) => element("tr", {}, element("th", { textContent: name + (needed ? " *" : ""), scope: "row" }),
    cell(kind(schema)), cell(schema?.default ?? ""), cell(schema?.description ?? ""))))];
}

$("routes").append(...Object.entries(groups).map(([name, routes]) => element("section", { id: name }, element("h2", { textContent: name }),
  ...routes.map(({ path, method, route }) => element("details", {},
    element("summary", {}, element("code", { textContent: `${method.toUpperCase()} ${path}` }), ` ${route.description ?? ""}`), ...fields(route))))));
