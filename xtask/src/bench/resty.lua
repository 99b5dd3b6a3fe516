-- lua-resty-lock's algorithm and its defaults: add with expiry, and while it is there sleep, twice as long each time up to half a second. (Its
-- timeout of 5 s is 20 s here, so that all get the lock, however long they wait.)
local locks = ngx.shared.locks
local key = KEY
local step, timeout = 0.001, 20
local added, why = locks:add(key, true, 30)
while not added and why == "exists" and timeout > 0 do
  ngx.sleep(step)
  timeout = timeout - step
  step = math.min(step * 2, 0.5, math.max(timeout, 0.001))
  added, why = locks:add(key, true, 30)
end
if not added then
  return ngx.exit(423)
end
ngx.ctx.key = key
