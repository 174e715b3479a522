-- Takes the usage event out of a stream whose client did not ask for it.
--
-- extproc added stream_options.include_usage to the request and left a mark in the dynamic metadata. The engine then sends one event
-- more, `"choices": []` with a usage object. sse_to_metadata has read it by the time it comes here; the client must not see it.
-- All other bytes pass unchanged and in order. An event is delivered by its blank line, so only an event that is still incomplete is
-- ever held back, and that only while it can still turn out to be the one: never an event that a client could already act on.

local MARK_NAMESPACE = "@NAMESPACE@"
local MARK_KEY = "@KEY@"

-- Longest incomplete event to hold. The usage event is about 250 bytes, 1 KiB with per-request metrics; beyond this it is none.
local MAX_HELD = 16384

local BLANK_LINE = "\r?\n\r?\n"

-- Inside a JSON string every quote has a backslash before it, so these find keys, and never text that a model wrote.
local NO_CHOICES = '"choices"%s*:%s*%[%s*%]'
local SOME_CHOICES = '"choices"%s*:%s*%[%s*[^%]%s]'
local USAGE = '"usage"%s*:%s*{'

local function is_usage(event)
  return event:find(USAGE) and event:find(NO_CHOICES)
end

-- A replica's incomplete event that is certainly not the usage event.
local function is_other(event)
  return #event > MAX_HELD or event:find(SOME_CHOICES)
end

local function is_marked(handle)
  local mark = handle:streamInfo():dynamicMetadata():get(MARK_NAMESPACE)
  return mark and mark[MARK_KEY] == true
end

local function is_event_stream(headers)
  local kind = headers:get("content-type")
  return kind and kind:lower():find("^text/event%-stream") and not headers:get("content-encoding")
end

function envoy_on_response(handle)
  if not is_marked(handle) or not is_event_stream(handle:headers()) then
    return
  end
  -- A stream rarely has a length; if it has, it counts the event that goes.
  handle:headers():remove("content-length")

  local held = ""        -- the tail of what came: an incomplete event, or the line ends of one
  local passing = false  -- the head of the incomplete event has gone out already
  local last = nil

  for chunk in handle:bodyChunks() do
    last = chunk
    local data = held .. chunk:getBytes(0, chunk:length())
    local out = {}
    local from = 1
    local done = false

    while true do
      local _, stop = data:find(BLANK_LINE, from)
      if not stop then
        break
      end
      local event = data:sub(from, stop)
      from = stop + 1
      if passing or not is_usage(event) then
        out[#out + 1] = event
      else
        done = true
      end
      passing = false
      if done then
        break
      end
    end

    local rest = data:sub(from)
    if done then
      -- There is one such event in a stream; what follows is none of our business.
      out[#out + 1] = rest
      chunk:setBytes(table.concat(out))
      return
    end
    passing = passing or is_other(rest)
    if passing then
      -- Line ends stay back: with the next chunk they may make the blank line.
      local line_ends = rest:match("[\r\n]*$")
      out[#out + 1] = rest:sub(1, #rest - #line_ends)
      rest = line_ends
    end

    if held ~= "" or rest ~= "" then
      chunk:setBytes(table.concat(out))
    end
    held = rest
  end

  -- The stream ended without a blank line. Its last chunk is still ours to change, unless trailers ended it (no engine sends any).
  if held ~= "" and last then
    pcall(function() last:setBytes(last:getBytes(0, last:length()) .. held) end)
  end
end
