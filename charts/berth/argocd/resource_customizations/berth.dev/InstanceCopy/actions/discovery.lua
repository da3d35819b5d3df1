local actions = {}
local suspended = obj.spec.suspend == true
actions["suspend"] = { ["disabled"] = suspended, ["iconClass"] = "fa fa-fw fa-pause", ["displayName"] = "Suspend" }
actions["resume"] = { ["disabled"] = not suspended, ["iconClass"] = "fa fa-fw fa-play", ["displayName"] = "Resume" }
actions["retry"] = { ["disabled"] = suspended, ["iconClass"] = "fa fa-fw fa-rotate-right", ["displayName"] = "Look now and try again" }
return actions
