-- A lock in Redis around a request: SET NX with an expiry before it, DEL after it, which nobody waits for.

function envoy_on_request(handle)
  local id = handle:headers():get("x-request-id")
  local path = "/SET/lock:" .. id .. "/" .. id .. "/NX/PX/10000"
  local head = { [":method"] = "GET", [":path"] = path, [":authority"] = "webdis" }
  local headers, body = handle:httpCall("webdis", head, nil, 5000)
  if headers[":status"] ~= "200" or body == nil or not string.find(body, "OK", 1, true) then
    handle:respond({ [":status"] = "423" }, "held")
    return
  end
  handle:streamInfo():dynamicMetadata():set("lock", "id", id)
end

function envoy_on_response(handle)
  local lock = handle:streamInfo():dynamicMetadata():get("lock")
  if lock == nil then
    return
  end
  local head = { [":method"] = "GET", [":path"] = "/DEL/lock:" .. lock["id"], [":authority"] = "webdis" }
  handle:httpCall("webdis", head, nil, 5000, true)
end
