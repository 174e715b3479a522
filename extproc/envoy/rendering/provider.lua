-- What passes between us and a provider elsewhere. It runs in the cluster of the provider: whatever came before, these headers and no others
-- go out and come in. The API key is put in after it.
--
-- Out: addresses of clients, their keys and cookies, sessions, tenants and paths of ours stay here, and what stands after "?", where some
-- clients put keys. Without accept-encoding, for the token counts of a compressed answer could not be read; without idempotency-key, for
-- under one account that of a client could bring the answer of another.
-- In: cookies, alt-svc and strict-transport-security would be taken for ours by clients; limits and names are those of our account.

local OUT = {@OUT@}
local QUERY = '@QUERY@'
local IN = {@IN@}

-- By status; what the provider says of our account is not for clients. SDKs try again after 429, 503 and the like.
local LIMITED = '@LIMITED@'
local REFUSED = '@REFUSED@'
local FAILED = '@FAILED@'

local function keep(headers, allowed)
  local others = {}
  for name in pairs(headers) do
    if name:sub(1, 1) ~= ":" and not allowed[name] then
      others[#others + 1] = name
    end
  end
  for _, name in ipairs(others) do
    headers:remove(name)
  end
end

-- Headers that come after the body, of which nobody needs any. Waits for them, and holds nothing back meanwhile.
local function drop_trailers(handle)
  local trailers = handle:trailers()
  if trailers then
    keep(trailers, {})
  end
end

-- The status for the client, and the error; nothing for answers to be passed on, errors of the request among them.
local function instead(status)
  if status == 429 then
    return 429, LIMITED
  elseif status == 401 or status == 402 or status == 403 then
    return 503, REFUSED
  elseif status >= 500 then
    return status, FAILED
  elseif status >= 300 and status < 400 then
    return 502, FAILED
  end
end

local function replace(handle, headers, status, error)
  headers:replace(":status", tostring(status))
  headers:replace("content-type", "application/json")
  headers:remove("content-encoding")
  if not headers:get("retry-after") then
    headers:add("retry-after", "1")
  end
  local text = error:gsub("%%STATUS%%", tostring(status))
  headers:replace("content-length", tostring(#text))
  handle:body(true):setBytes(text)
end

function envoy_on_request(handle)
  local headers = handle:headers()
  keep(headers, OUT)
  headers:replace(":path", headers:get(":path"):match("^[^?]*") .. QUERY)
  drop_trailers(handle)
end

function envoy_on_response(handle)
  local headers = handle:headers()
  keep(headers, IN)
  local status, error = instead(tonumber(headers:get(":status")) or 500)
  if error then
    replace(handle, headers, status, error)
  end
  drop_trailers(handle)
end
