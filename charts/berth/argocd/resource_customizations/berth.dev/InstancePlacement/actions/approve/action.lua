-- approves the plan that is shown at this moment: its digest, so that another plan needs another approval
local plan = obj.status ~= nil and obj.status.plan or nil
if plan == nil or plan.digest == nil or plan.digest == "" then
  error("there is no plan to approve", 0)
end
if obj.metadata.annotations == nil then
  obj.metadata.annotations = {}
end
obj.metadata.annotations["berth.dev/approve"] = plan.digest
return obj
