-- What every script begins with: its clock, its keys, and how records stand in them.
--
-- KEYS[1] is `{tidegate:<namespace>}:meta`; all other keys share its prefix, and so its slot. ARGV[1] is the time in
-- microseconds where a test sets it, and empty where the server's clock counts. ARGV[2] is the epoch of a log that has to
-- be made, ARGV[3] names the instance that calls. Arguments of a script's own begin at ARGV[4].
--
-- Seqs travel through here as texts, and are compared as numbers: exact below 2^53. Tokens are eight bytes and no numbers.

local call, meta = redis.call, KEYS[1]
local P = string.sub(meta, 1, -5)
local pack, unpack_from = struct.pack, struct.unpack
local now = tonumber(ARGV[1])
if not now then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2]
end

local function int(number)
  return string.format('%.0f', number)
end

-- Lua's stack bounds how many arguments one call can have.
local STEP = 4000

local function many(command, key, list)
  local count = #list
  for from = 1, count, STEP do
    call(command, key, unpack(list, from, math.min(from + STEP - 1, count)))
  end
end

local function fetch(key, fields)
  local count = #fields
  if count == 0 then return {} end
  if count <= STEP then return call('HMGET', key, unpack(fields)) end
  local all, at = {}, 0
  for from = 1, count, STEP do
    local part = call('HMGET', key, unpack(fields, from, math.min(from + STEP - 1, count)))
    for i = 1, #part do
      at = at + 1
      all[at] = part[i]
    end
  end
  return all
end

-- Lists by name, made when they are first asked for.
local function lists()
  return setmetatable({}, { __index = function(all, name)
    local list = {}
    rawset(all, name, list)
    return list
  end })
end

local function ensure_log()
  if call('HSETNX', meta, 'epoch', ARGV[2]) == 1 then
    call('HSET', meta, 'schema', '2', 'head', '0', 'pruned', '0', 'swept', '0')
  end
end

-- A server without memory refuses to begin with a command that may need some, but lets a script go on that has begun. What
-- only ends or removes things begins with this.
local function allow_when_full()
  call('HDEL', meta, '')
end

-- Counts kept in the meta key: p, x and f are events pending, processing and failed; dp and dx are deliveries.
local counts = { p = 0, x = 0, f = 0, c = 0, dp = 0, dx = 0 }

local function count(what, by)
  counts[what] = counts[what] + by
end

-- A delivery, as a record in `d:<subscription>` under its seq. Instants are microseconds; 0 is none. SOLE is 1 while its
-- event never had another: then it says of the event what progress would say.
local STAGE, FRESH, REPLAY, KEYED, SOLE = 1, 2, 3, 4, 5
local APPENDED, DUE, STARTED, COMPLETED, CLAIMED = 6, 7, 8, 9, 10
local RETRIES, TRIES, INFRA, NUMBER, TOKEN, KEY, WORKER = 11, 12, 13, 14, 15, 16, 17
local PENDING, LEASED, DONE, DEAD = 0, 1, 2, 3
local DELIVERY = '<BBBBBdddddI4I4I4I4c8I4c0I4c0'
local NO_TOKEN = string.rep('\0', 8)
local TOKEN_AT = 62

local function read_delivery(text)
  return { unpack_from(DELIVERY, text) }
end

local function delivery_text(d)
  return pack(DELIVERY, d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8], d[9], d[10], d[11], d[12], d[13], d[14], d[15],
    #d[16], d[16], #d[17], d[17])
end

-- An event's facts, as a record in `ev` under its seq: when it was appended and made, type, id, key ('=' before it, or
-- nothing), and the numbers of the subscriptions that have a delivery, four bytes each.
local EVENT = '<ddI4c0I4c0I4c0I4c0'

local function event_text(appended, created, kind, id, key, subs)
  return pack(EVENT, appended, created, #kind, kind, #id, id, #key, key, #subs, subs)
end

local function read_event(text)
  local appended, created, kind, id, key, subs = unpack_from(EVENT, text)
  return { appended = appended, created = created, kind = kind, id = id, key = key, subs = subs }
end

local function subs_of(event)
  local list = {}
  for at = 1, #event.subs, 4 do
    list[#list + 1] = int((unpack_from('<I4', event.subs, at)))
  end
  return list
end

-- How many deliveries of an event are open, were ever begun and have failed: in `pg` under its seq, unless it is completed,
-- or has a sole delivery. The seventh is true for the latter.
local PROGRESS = '<I4I4I4'
local progress, deliveries = {}, {}

local function sole_progress(d)
  return (d[STAGE] < DONE) and 1 or 0, (d[STARTED] > 0) and 1 or 0, (d[STAGE] == DEAD) and 1 or 0
end

-- What was loaded of the deliveries to `sub` need not be looked for.
local function load_progress(seqs, sub)
  local missing, own = {}, sub and deliveries[sub]
  for _, seq in ipairs(seqs) do
    if not progress[seq] then
      local d = own and own[seq]
      if d and d[SOLE] == 1 then
        local open, begun, failed = sole_progress(d)
        progress[seq] = { open, begun, failed, open, begun, failed, true }
      else
        progress[seq] = { 0, 0, 0, 0, 0, 0 }
        missing[#missing + 1] = seq
      end
    end
  end
  for i, text in ipairs(fetch(P .. 'pg', missing)) do
    if text then
      local open, begun, failed = unpack_from(PROGRESS, text)
      progress[missing[i]] = { open, begun, failed, open, begun, failed }
    end
  end
end

local function status(open, begun, failed)
  if open > 0 then return begun > 0 and 'x' or 'p' end
  return failed > 0 and 'f' or 'c'
end

-- Events that have no open delivery any more.
local closed, late, swept = {}, {}, nil

local function close_event(seq)
  closed[#closed + 1] = seq
  swept = swept or tonumber(call('HGET', meta, 'swept') or 0)
  if tonumber(seq) <= swept then
    late[#late + 1] = seq
    late[#late + 1] = seq
  end
end

local function store_progress()
  local set, gone, opened = {}, {}, {}
  for seq, p in pairs(progress) do
    local open, begun, failed = p[1], p[2], p[3]
    if open ~= p[4] or begun ~= p[5] or failed ~= p[6] then
      local before, after = status(p[4], p[5], p[6]), status(open, begun, failed)
      if before ~= after then
        count(before, -1)
        count(after, 1)
      end
      if after == 'c' and not p[7] then
        gone[#gone + 1] = seq
      elseif not p[7] then
        set[#set + 1] = seq
        set[#set + 1] = pack(PROGRESS, open, begun, failed)
      end
      if open > 0 and p[4] == 0 then
        opened[#opened + 1] = seq
        opened[#opened + 1] = seq
      elseif open == 0 and p[4] > 0 then
        close_event(seq)
      end
    end
  end
  progress = {}
  many('ZREM', P .. 'open', closed)
  many('HDEL', P .. 'pg', gone)
  many('HSET', P .. 'pg', set)
  many('ZADD', P .. 'open', opened)
  many('ZADD', P .. 'late', late)
  closed, late = {}, {}
end

-- Ready deliveries stand in `q:<subscription>` by seq, but those behind an earlier open one of their key in `b:`. Later
-- ones wait in `w:` by when they are due, leases in `l:` by their end. `k:<subscription>:<key>` has a key's open ones.
local ready = lists()
local is_woken = false

local function key_of(sub, key)
  return P .. 'k:' .. sub .. ':' .. key
end

local function open_key(sub, seq, key)
  local k = key_of(sub, key)
  local first = call('ZRANGE', k, 0, 0)[1]
  call('ZADD', k, seq, seq)
  if first and tonumber(first) > tonumber(seq) and call('ZREM', P .. 'q:' .. sub, first) == 1 then
    call('ZADD', P .. 'b:' .. sub, first, first)
  end
end

local function close_key(sub, seq, key)
  local k = key_of(sub, key)
  call('ZREM', k, seq)
  local first = call('ZRANGE', k, 0, 0)[1]
  if first and call('ZREM', P .. 'b:' .. sub, first) == 1 then
    call('ZADD', P .. 'q:' .. sub, first, first)
    is_woken = true
  end
end

-- Lines a pending delivery up. What has a key must already stand among its key's open ones.
local function line_up(sub, seq, d)
  if d[DUE] > now then
    call('ZADD', P .. 'w:' .. sub, int(d[DUE]), seq)
    return
  end
  is_woken = true
  if d[KEYED] == 0 then
    local list = ready[sub]
    list[#list + 1] = seq
    list[#list + 1] = seq
  elseif call('ZRANGE', key_of(sub, d[KEY]), 0, 0)[1] == seq then
    call('ZADD', P .. 'q:' .. sub, seq, seq)
  else
    call('ZADD', P .. 'b:' .. sub, seq, seq)
  end
end

-- Deliveries read and changed by this script, and attempts to add to them.
local records = {}
local changed, fresh_records = lists(), lists()

local function load_deliveries(sub, seqs)
  local own = deliveries[sub] or {}
  deliveries[sub] = own
  local missing = {}
  for _, seq in ipairs(seqs) do
    if own[seq] == nil then
      own[seq] = false
      missing[#missing + 1] = seq
    end
  end
  for i, text in ipairs(fetch(P .. 'd:' .. sub, missing)) do
    if text then own[missing[i]] = read_delivery(text) end
  end
end

local function record(sub, seq, d, number, text)
  text = pack('<I4', #text) .. text
  if d[NUMBER] == 0 then
    local list = fresh_records[sub]
    list[#list + 1] = seq
    list[#list + 1] = text
  else
    local place = sub .. ' ' .. seq
    records[place] = { sub, seq, (records[place] and records[place][3] or '') .. text }
  end
  d[NUMBER] = number
end

local function store_deliveries()
  for sub, touched in pairs(changed) do
    local list = {}
    for seq in pairs(touched) do
      list[#list + 1] = seq
      list[#list + 1] = delivery_text(deliveries[sub][seq])
    end
    many('HSET', P .. 'd:' .. sub, list)
  end
  for sub, list in pairs(fresh_records) do
    many('HSET', P .. 'a:' .. sub, list)
  end
  for _, one in pairs(records) do
    local a = P .. 'a:' .. one[1]
    call('HSET', a, one[2], (call('HGET', a, one[2]) or '') .. one[3])
  end
  for sub, list in pairs(ready) do
    many('ZADD', P .. 'q:' .. sub, list)
  end
  changed, fresh_records, records, ready = lists(), lists(), {}, lists()
end

-- Ends a claim. `kind` is c(omplete), f(ail), r(etry) or l, as if it had never been. The lease's place is the caller's.
local function end_claim(sub, seq, d, kind, due, is_infra)
  local p = progress[seq]
  changed[sub][seq] = true
  count('dx', -1)
  d[WORKER], d[TOKEN], d[CLAIMED] = '', NO_TOKEN, 0
  if kind == 'c' or kind == 'f' then
    d[STAGE], d[COMPLETED] = (kind == 'c') and DONE or DEAD, now
    p[1] = p[1] - 1
    if kind == 'f' then
      p[3] = p[3] + 1
      call('ZADD', P .. 'dead', seq, seq .. ':' .. sub)
    end
    if d[KEYED] == 1 then close_key(sub, seq, d[KEY]) end
    return
  end
  d[STAGE] = PENDING
  count('dp', 1)
  if kind == 'r' then
    d[DUE] = due
    d[RETRIES] = d[RETRIES] + 1
    if is_infra then d[INFRA] = d[INFRA] + 1 else d[TRIES] = d[TRIES] + 1 end
  elseif d[FRESH] == 1 then
    d[STARTED] = 0
    p[2] = p[2] - 1
  end
  line_up(sub, seq, d)
end

-- The number of a subscription, given to it when it is first named.
local function sub_id(name)
  local id = call('HGET', P .. 'subs', name)
  if not id then
    ensure_log()
    id = int(call('HINCRBY', meta, 'subs', 1))
    call('HSET', P .. 'subs', name, id)
    call('HSET', P .. 'names', id, name)
  end
  return id
end

-- Writes back what is kept in memory until here, and tells other instances when there is something for them.
local function finish(is_read)
  store_deliveries()
  store_progress()
  for what, by in pairs(counts) do
    if by ~= 0 and what ~= 'c' then call('HINCRBY', meta, what, by) end
  end
  if is_woken or is_read then call('PUBLISH', P .. 'wake', ARGV[3]) end
end
