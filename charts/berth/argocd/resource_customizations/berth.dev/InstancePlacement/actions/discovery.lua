local actions = {}
local suspended = obj.spec.suspend == true
actions["suspend"] = { ["disabled"] = suspended, ["iconClass"] = "fa fa-fw fa-pause", ["displayName"] = "Suspend" }
actions["resume"] = { ["disabled"] = not suspended, ["iconClass"] = "fa fa-fw fa-play", ["displayName"] = "Resume" }
actions["retry"] = { ["disabled"] = suspended, ["iconClass"] = "fa fa-fw fa-rotate-right", ["displayName"] = "Look now and try again" }

local waits = false
if obj.status ~= nil and obj.status.conditions ~= nil and obj.status.plan ~= nil and obj.status.plan.digest ~= nil then
  for _, condition in ipairs(obj.status.conditions) do
    if condition.type == "Ready" and condition.reason == "WaitingForApproval" then
      waits = true
    end
  end
end
actions["approve"] = { ["disabled"] = not waits, ["iconClass"] = "fa fa-fw fa-check", ["displayName"] = "Approve the plan" }
return actions
