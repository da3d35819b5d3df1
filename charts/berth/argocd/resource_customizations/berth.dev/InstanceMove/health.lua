-- A move that has ended is history, however it ended: whether the instance is where it shall be is said by its InstancePlacement.
-- Only what a person has to settle is Degraded.
local hs = { status = "Progressing", message = "Accepted" }
if obj.status == nil then
  return hs
end
local function with_error(text)
  local last = obj.status.lastError
  if last ~= nil and last.message ~= nil and last.message ~= "" then
    text = text .. ": " .. last.message
    if last.fix ~= nil and last.fix ~= "" then
      text = text .. "; " .. last.fix
    end
  end
  return text
end
local outcome = obj.status.outcome
if outcome == nil or outcome == "" then
  hs.message = with_error(obj.status.step or "Accepted")
  local progress = obj.status.progress
  if progress ~= nil and progress.percent ~= nil then
    hs.message = hs.message .. ", " .. tostring(progress.percent) .. " %"
  end
elseif outcome == "NeedsAttention" then
  hs.status = "Degraded"
  hs.message = with_error(outcome)
elseif outcome == "Succeeded" then
  hs.status = "Healthy"
  hs.message = outcome
else
  hs.status = "Healthy"
  hs.message = with_error(outcome)
end
return hs
