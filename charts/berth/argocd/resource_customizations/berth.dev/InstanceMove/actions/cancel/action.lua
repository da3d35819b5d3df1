-- one-way: a move that is not yet committed is undone; to move after all, use `retry` on the InstancePlacement
obj.spec.cancel = true
return obj
