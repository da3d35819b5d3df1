local actions = {}
local cordoned = obj.spec.cordoned == true
actions["cordon"] = { ["disabled"] = cordoned, ["iconClass"] = "fa fa-fw fa-ban", ["displayName"] = "Let nothing more move here" }
actions["uncordon"] = { ["disabled"] = not cordoned, ["iconClass"] = "fa fa-fw fa-check", ["displayName"] = "Let instances move here again" }
return actions
