-- Leases what is ready: first makes ready what has become due and takes away what has expired, then the oldest.
--
-- ARGV[4] the worker, [5] the lease, [6] eight random bytes for each lease, [7] how many lost leases a delivery survives,
-- [8] the most deliveries of each kind of step; then of each wanted subscription its name, room, and 1 where keys are
-- ordered. Answers with the epoch, the leases, the ones lost, when the next becomes due (empty for never), and 1 where
-- more is past than one call may move.

allow_when_full()
local worker, lease, tokens, budget, step =
  ARGV[4], tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local names = {}
for at = 9, #ARGV, 3 do
  names[#names + 1] = ARGV[at]
end
local ids = fetch(P .. 'subs', names)
local left, lost = step, {}

local function make_ready(sub)
  local w = P .. 'w:' .. sub
  local due = call('ZRANGEBYSCORE', w, '-inf', int(now), 'LIMIT', 0, left)
  if #due == 0 then return end
  left = left - #due
  many('ZREM', w, due)
  load_deliveries(sub, due)
  for _, seq in ipairs(due) do
    local d = deliveries[sub][seq]
    if d and d[STAGE] == PENDING then line_up(sub, seq, d) end
  end
end

local function take_away(want, sub)
  local l = P .. 'l:' .. sub
  local gone = call('ZRANGEBYSCORE', l, '-inf', int(now), 'LIMIT', 0, left)
  if #gone == 0 then return end
  left = left - #gone
  many('ZREM', l, gone)
  load_deliveries(sub, gone)
  load_progress(gone, sub)
  for _, seq in ipairs(gone) do
    local d = deliveries[sub][seq]
    if d and d[STAGE] == LEASED then
      local is_last = d[INFRA] + 1 > budget
      lost[#lost + 1] = pack('<I4dc8B', want, tonumber(seq), d[TOKEN], is_last and 1 or 0)
      -- What a lost attempt's record holds; the reader makes words of it.
      local text = pack('<BI4dd', 0, d[NUMBER] + 1, d[CLAIMED], now) .. d[WORKER]
      record(sub, seq, d, d[NUMBER] + 1, text)
      end_claim(sub, seq, d, is_last and 'f' or 'r', now, true)
    end
  end
end

for i, sub in ipairs(ids) do
  if sub and left > 0 then make_ready(sub) end
  if sub and left > 0 then take_away(i, sub) end
end
if #lost > 0 or left < step then
  store_deliveries()
end

-- The oldest ready ones, also of those behind others of their key where keys are not ordered.
local function oldest(sub, room, is_ordered)
  local q, b, seqs = P .. 'q:' .. sub, P .. 'b:' .. sub, {}
  if is_ordered or call('EXISTS', b) == 0 then
    local popped = call('ZPOPMIN', q, room)
    for i = 1, #popped, 2 do
      seqs[#seqs + 1] = popped[i]
    end
    return seqs
  end
  local one, other = call('ZRANGE', q, 0, room - 1), call('ZRANGE', b, 0, room - 1)
  local from_q, from_b, i, j = {}, {}, 1, 1
  while #seqs < room and (one[i] or other[j]) do
    if one[i] and (not other[j] or tonumber(one[i]) < tonumber(other[j])) then
      seqs[#seqs + 1], from_q[#from_q + 1], i = one[i], one[i], i + 1
    else
      seqs[#seqs + 1], from_b[#from_b + 1], j = other[j], other[j], j + 1
    end
  end
  many('ZREM', q, from_q)
  many('ZREM', b, from_b)
  return seqs
end

local leases, given, ends = {}, 0, int(now + lease)

-- The deliveries of a batch of events have one record. Where it is of those that nobody has claimed yet, have no key and
-- are their event's only ones, what it becomes is made once: what stands before the token and behind it, and the end of the
-- lease. Reading and packing each by itself would take longer than all that the server does for it.
local function claim_alike(text)
  local d = read_delivery(text)
  if d[STAGE] ~= PENDING or d[STARTED] ~= 0 or d[KEYED] == 1 or d[SOLE] ~= 1 then return false end
  d[STAGE], d[FRESH], d[STARTED], d[CLAIMED], d[WORKER] = LEASED, 1, now, now, worker
  local leased = delivery_text(d)
  return { string.sub(leased, 1, TOKEN_AT - 1), string.sub(leased, TOKEN_AT + 8),
    pack('<I4I4I4Bd', d[TRIES], d[INFRA], d[NUMBER], d[REPLAY], d[APPENDED]) }
end

local function take(want, sub, room, is_ordered)
  local seqs, firsts, places = oldest(sub, room, is_ordered), {}, {}
  local alike, kinds, others, rows = {}, {}, {}, {}
  for i, text in ipairs(fetch(P .. 'd:' .. sub, seqs)) do
    if text and kinds[text] == nil then kinds[text] = claim_alike(text) end
    alike[i] = text and kinds[text]
    if not alike[i] then others[#others + 1] = seqs[i] end
  end
  load_deliveries(sub, others)
  local own = deliveries[sub]
  for _, seq in ipairs(others) do
    local d = own[seq]
    if d and d[STAGE] == PENDING and d[STARTED] == 0 then firsts[#firsts + 1] = seq end
  end
  load_progress(firsts, sub)
  for _, seq in ipairs(firsts) do
    progress[seq][2] = progress[seq][2] + 1
  end
  for i, seq in ipairs(seqs) do
    local kind, d = alike[i], own[seq]
    if kind then
      local token = string.sub(tokens, given * 8 + 1, given * 8 + 8)
      given = given + 1
      local at = #places
      places[at + 1], places[at + 2] = ends, seq
      at = #rows
      rows[at + 1], rows[at + 2] = seq, kind[1] .. token .. kind[2]
      leases[given] = pack('<I4d', want, tonumber(seq)) .. token .. kind[3]
    elseif d and d[STAGE] == PENDING then
      d[FRESH] = (d[STARTED] == 0) and 1 or 0
      if d[FRESH] == 1 then d[STARTED] = now end
      d[STAGE], d[CLAIMED], d[WORKER] = LEASED, now, worker
      d[TOKEN] = string.sub(tokens, given * 8 + 1, given * 8 + 8)
      given = given + 1
      changed[sub][seq] = true
      places[#places + 1] = ends
      places[#places + 1] = seq
      leases[given] = pack('<I4dc8I4I4I4Bd', want, tonumber(seq), d[TOKEN], d[TRIES], d[INFRA], d[NUMBER], d[REPLAY],
        d[APPENDED])
    end
  end
  many('HSET', P .. 'd:' .. sub, rows)
  count('p', -#rows / 2)
  count('x', #rows / 2)
  many('ZADD', P .. 'l:' .. sub, places)
  count('dp', -#places / 2)
  count('dx', #places / 2)
end

local is_more = left <= 0
for i, sub in ipairs(ids) do
  local room = math.min(tonumber(ARGV[3 * i + 7]), step - given)
  if sub and room > 0 and not is_more then take(i, sub, room, ARGV[3 * i + 8] == '1') end
end
-- Others learn of what is due from the clock, as this instance did.
is_woken = false
finish()

local next_due
for _, sub in ipairs(ids) do
  if sub then
    for _, kind in ipairs({ 'w:', 'l:' }) do
      local at = call('ZRANGE', P .. kind .. sub, 0, 0, 'WITHSCORES')[2]
      if at and (not next_due or tonumber(at) < next_due) then next_due = tonumber(at) end
    end
  end
end
return { call('HGET', meta, 'epoch') or '', int(now), table.concat(leases), table.concat(lost),
  next_due and int(next_due) or '', is_more and '1' or '0' }
