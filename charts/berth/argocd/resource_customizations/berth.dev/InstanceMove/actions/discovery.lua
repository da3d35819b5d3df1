local committed = { Committed = true, Started = true, Retired = true, Cleaned = true }
local over = obj.spec.cancel == true
if obj.status ~= nil then
  local outcome = obj.status.outcome
  over = over or (outcome ~= nil and outcome ~= "") or obj.status.step == "Undoing" or committed[obj.status.step or ""] == true
end
local actions = {}
actions["cancel"] = { ["disabled"] = over, ["iconClass"] = "fa fa-fw fa-stop", ["displayName"] = "Cancel and undo" }
return actions
