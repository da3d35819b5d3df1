-- Ready, Reconciling and Stalled as in kstatus; what is neither ready nor at work nor stalled waits because it was told to.
local hs = { status = "Progressing", message = "Waiting for Berth to look at it" }
if obj.status == nil or obj.status.conditions == nil then
  return hs
end
if obj.status.observedGeneration ~= nil and obj.metadata.generation ~= nil and obj.status.observedGeneration ~= obj.metadata.generation then
  hs.message = "Waiting for Berth to look at the new spec"
  return hs
end
local found = {}
for _, condition in ipairs(obj.status.conditions) do
  found[condition.type] = condition
end
local ready = found["Ready"]
if ready == nil then
  return hs
end
hs.message = ready.message
if ready.reason ~= nil and ready.reason ~= "" then
  hs.message = ready.reason .. ": " .. (ready.message or "")
end
if ready.status == "True" then
  hs.status = "Healthy"
elseif found["Stalled"] ~= nil and found["Stalled"].status == "True" then
  hs.status = "Degraded"
elseif ready.status == "False" and (found["Reconciling"] == nil or found["Reconciling"].status ~= "True") then
  hs.status = "Suspended"
end
return hs
