-- Reads the token counts of a response, JSON or stream, notes one that fails under status 200, and takes the usage event out of a stream
-- whose client did not ask for it. Nothing is buffered: every byte goes on as it comes, except that one event and what can still turn out to be it.
--
-- chat, completions, embeddings   "usage": {"prompt_tokens", "completion_tokens", "prompt_tokens_details": {"cached_tokens"}}
-- /v1/responses                   "usage": {"input_tokens", "output_tokens", "input_tokens_details": {"cached_tokens"}}
--
-- A dead engine ends a stream with an event data: {"error": {...}}, one that is stopped ends all with "finish_reason":"abort".

local COUNTS = "@USAGE_NAMESPACE@"   -- dynamic metadata to write
local MARKS = "@NAMESPACE@"          -- and to read: extproc sets the mark when it asked the engine for the usage event
local STRIP = "@STRIP_USAGE@"

-- Inside a JSON string every quote has a backslash before it, so these patterns find keys, and never text that a model wrote.
local FIELDS = {
  {"@PROMPT_TOKENS@", '"prompt_tokens"%s*:%s*(%d+)'},
  {"@PROMPT_TOKENS@", '"input_tokens"%s*:%s*(%d+)'},
  {"@COMPLETION_TOKENS@", '"completion_tokens"%s*:%s*(%d+)'},
  {"@COMPLETION_TOKENS@", '"output_tokens"%s*:%s*(%d+)'},
  {"@CACHED_TOKENS@", '"cached_tokens"%s*:%s*(%d+)'},
}
local USAGE_KEY = '"usage"'
local USAGE = '^"usage"%s*:%s*(%b{})'

-- What stays of each chunk, so that a key cut in two is still found: longer than each of the patterns for a failure.
local SEAM = 48

-- The plain ones are looked for in each piece, and begin with a character that is rare there: the search leaps from one to the next.
local ERROR = '{"error"'
local ERROR_EVENT = 'data:%s*{"error"%s*:%s*[{"]'
local ERROR_BODY = '^%s*{"error"%s*:%s*[{"]'
local ABORT = 'bort"'
local ABORTED = '"finish_reason"%s*:%s*"abort"'

-- How an answer of chat or completions begins, whose structure is the engine's alone. /v1/responses repeats what clients send, metadata
-- and schemas of tools, in which a client could say that a replica failed.
local OWN = '{%s*"id"%s*:%s*"[^"]*"%s*,%s*"object"%s*:%s*"([^"]*)"'
local OWN_EVENT = '^data:%s*' .. OWN
local OWN_BODY = '^%s*' .. OWN
local OBJECTS = {["chat.completion"] = true, ["chat.completion.chunk"] = true, ["text_completion"] = true}
local HEAD = 512

-- Longest unfinished piece to remember between chunks. A usage object is about 250 bytes, 1 KiB with per-request metrics.
local MAX_HELD = 16384

local function note(handle, usage)
  local metadata = handle:streamInfo():dynamicMetadata()
  for _, field in ipairs(FIELDS) do
    local count = usage:match(field[2])
    if count then
      metadata:set(COUNTS, field[1], tonumber(count))
    end
  end
end

-- Looks for signs of failure in the pieces of one response.
local Watch = {}
Watch.__index = Watch

local function watch(handle, is_stream)
  local ok = handle:headers():get(":status") == "200"
  return setmetatable({handle = handle, is_stream = is_stream, over = not ok, head = ""}, Watch)
end

-- `data` is the piece, with the end of those before it.
function Watch:piece(data, piece)
  if self.over then
    return
  end
  if self.head then
    self:begin(piece)
  end
  if (self.own and data:find(ABORT, 1, true) and data:find(ABORTED))
      or (self.is_stream and data:find(ERROR, 1, true) and data:find(ERROR_EVENT)) then
    self:broken()
  end
end

-- Until enough is there to tell what this is. `self.head` is nil from then on.
function Watch:begin(piece)
  local head = self.head .. piece
  if self.is_stream then
    local at = head:find("data:", 1, true)
    if not at then
      self.head = head:sub(-4)   -- comments that keep the connection alive
      return
    end
    head = head:sub(at)
  end
  local object = head:match(self.is_stream and OWN_EVENT or OWN_BODY)
  self.own = OBJECTS[object or ""]
  self.head = not object and #head < HEAD and head or nil
  if not self.is_stream and head:find(ERROR_BODY) then
    self:broken()
  end
end

function Watch:broken()
  self.over = true
  self.handle:streamInfo():dynamicMetadata():set(COUNTS, "@BROKEN@", true)
end

-- Notes every usage object in `data`, so that the last one stays: with continuous_usage_stats each event has one, and only the last is
-- whole. Returns where an unfinished one begins, or could: from there the next chunk must be read again.
local function scan(handle, data)
  local from = 1
  while true do
    local at = data:find(USAGE_KEY, from, true)
    if not at then
      return math.max(from, #data - SEAM)
    end
    local usage = data:match(USAGE, at)
    if usage then
      note(handle, usage)
    elseif data:match('^"usage"%s*:?%s*$', at) or data:match('^"usage"%s*:%s*{', at) then
      return at
    end
    from = at + #USAGE_KEY
  end
end

local function read(handle, watched)
  local rest = ""
  for chunk in handle:bodyChunks() do
    local piece = chunk:getBytes(0, chunk:length())
    local data = rest .. piece
    watched:piece(data, piece)
    rest = data:sub(scan(handle, data))
    if #rest > MAX_HELD then
      rest = ""
    end
  end
end

local BLANK_LINE = "\r?\n\r?\n"
local NO_CHOICES = '"choices"%s*:%s*%[%s*%]'
local SOME_CHOICES = '"choices"%s*:%s*%[%s*[^%]%s]'
local USAGE_OBJECT = '"usage"%s*:%s*{'

local function is_usage_event(event)
  return event:find(USAGE_KEY, 1, true) and event:find(USAGE_OBJECT) and event:find(NO_CHOICES)
end

-- Takes the complete events of `data` but the usage event into `out`. Returns where the rest begins, and whether that event was there.
-- `passing`: the head of the first event has gone out already, so it is another.
local function take_events(handle, data, passing, out)
  local from = 1
  while true do
    local _, stop = data:find(BLANK_LINE, from)
    if not stop then
      return from, false
    end
    local event = data:sub(from, stop)
    from = stop + 1
    if event:find(USAGE_KEY, 1, true) then
      scan(handle, event)
    end
    if not passing and is_usage_event(event) then
      return from, true
    end
    out[#out + 1] = event
    passing = false
  end
end

-- An event is delivered by its blank line, so to hold an unfinished one delays nothing that a client could act on.
local function read_and_strip(handle, watched)
  -- A stream rarely has a length; if it has, it counts the event that goes.
  handle:headers():remove("content-length")
  local held = ""        -- an unfinished event, or the line ends of one that is passing
  local passing = false
  local seam = ""        -- the end of what has gone out of a passing event
  local last

  for chunk in handle:bodyChunks() do
    last = chunk
    local piece = chunk:getBytes(0, chunk:length())
    local data = held .. piece
    watched:piece(seam == "" and data or seam .. data, piece)
    local out = {}
    local from, found = take_events(handle, data, passing, out)
    local rest = data:sub(from)
    if found then
      -- A stream has one such event; what follows is not ours.
      chunk:setBytes(table.concat(out) .. rest)
      return
    end

    passing = (passing and from == 1) or #rest > MAX_HELD or rest:find(SOME_CHOICES) ~= nil
    if passing then
      -- The line ends stay back: with the next chunk they may make the blank line.
      local ends = rest:match("[\r\n]*$")
      out[#out + 1] = rest:sub(1, #rest - #ends)
      seam = rest:sub(-SEAM - #ends, #rest - #ends)
      rest = ends
    else
      seam = ""
    end
    if held ~= "" or rest ~= "" then
      chunk:setBytes(table.concat(out))
    end
    held = rest
  end

  -- The stream ended without a blank line. Its last chunk can still be changed, unless trailers came after it; no engine sends any.
  if held ~= "" and last then
    pcall(function() last:setBytes(last:getBytes(0, last:length()) .. held) end)
  end
end

local function is_marked(handle)
  local marks = handle:streamInfo():dynamicMetadata():get(MARKS)
  return marks and marks[STRIP] == true
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local kind = (headers:get("content-type") or ""):lower()
  if headers:get("content-encoding") then
    return
  end
  local is_stream = kind:find("^text/event%-stream")
  if is_stream and is_marked(handle) then
    read_and_strip(handle, watch(handle, true))
  elseif is_stream or kind:find("^application/json") then
    read(handle, watch(handle, is_stream))
  end
end
