-- Applies the ends of attempts, each by itself. ARGV[4] begins the lists of subscriptions that published events go to; then
-- the number of settlements and the number of names, the names of their subscriptions, and of each settlement: its HEAD,
-- seq and attempt's record, then its writes and its published events. A HEAD packs the place of its name, token, kind
-- (c, f, r or l), delay, 1 for an infrastructure fault, the attempt's number (0 for none), 1 for a success whose writes can
-- never be applied, and the number of writes and of published events: an argument costs more than a number. Answers with a
-- letter each: o(pen event), c(ompleted event) or f(ailed event) for what closed it, s(tale), x (conflict); then of each
-- conflict its place, the write's place, why, and what is stored.

local chosen, at = read_lists(4)
local total, name_count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
local names = {}
for i = 1, name_count do
  names[i] = ARGV[at + 1 + i]
end
local ids = fetch(P .. 'subs', names)
at = at + 2 + name_count

local HEAD = '<I4c8c1dBI4BI4I4'
local SUB, SEQ, AT, LEASE, KIND, DELAY, IS_INFRA, ATTEMPT, IS_MISNAMED, WRITES, PUBLISHED = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
local ends, wanted, owners = {}, lists(), lists()
for i = 1, total do
  local place, token, kind, delay, is_infra, attempt, is_misnamed, writes, events = unpack_from(HEAD, ARGV[at])
  local sub, seq = ids[place], ARGV[at + 1]
  ends[i] = { sub, seq, at + 3, token, kind, delay, is_infra, attempt, is_misnamed, writes, events }
  at = at + 3 + 4 * writes + 7 * events
  if sub then
    local list = wanted[sub]
    local last = #list + 1
    list[last], owners[sub][last] = seq, i
  end
end

-- Most attempts of a batch are first ones that succeed and write nothing, at deliveries without a key that are their event's
-- only ones and were claimed together: they have one record up to the token, and end with one record. It is made once for
-- all of them, since reading and packing each by itself would take longer than all that the server does for it.
local function done_alike(text)
  local d = read_delivery(text)
  if d[STAGE] ~= LEASED or d[KEYED] == 1 or d[SOLE] ~= 1 or d[NUMBER] > 0 then return false end
  d[STAGE], d[COMPLETED], d[WORKER], d[TOKEN], d[CLAIMED], d[NUMBER] = DONE, now, '', NO_TOKEN, 0, 1
  return delivery_text(d)
end

local function is_plain(one)
  return one[KIND] == 'c' and one[ATTEMPT] == 1 and one[WRITES] == 0 and one[PUBLISHED] == 0 and one[IS_MISNAMED] == 0
end

local done = {}
for sub, list in pairs(wanted) do
  local kinds, others, seen = {}, {}, {}
  for at, text in ipairs(fetch(P .. 'd:' .. sub, list)) do
    local i, seq = owners[sub][at], list[at]
    local one, first = ends[i], seen[seq]
    seen[seq] = i
    if first then
      -- Two ends of one delivery go the long way, where what one does to it is seen by the other.
      others[#others + 1], done[first] = seq, nil
    elseif text and is_plain(one) and string.sub(text, TOKEN_AT, TOKEN_AT + 7) == one[LEASE] then
      local head = string.sub(text, 1, TOKEN_AT - 1)
      if kinds[head] == nil then kinds[head] = done_alike(text) end
      done[i] = kinds[head] or nil
    end
    if not done[i] then others[#others + 1] = seq end
  end
  load_deliveries(sub, others)
  load_progress(others, sub)
end

-- A decimal integer as two numbers of ten digits with its sign, or nil for what is none of 64 bits.
local function limbs(text)
  local sign, digits = string.match(text, '^([+-]?)0*(%d*)$')
  if not sign or #digits > 19 or not string.find(text, '%d') then return nil end
  digits = string.rep('0', 20 - #digits) .. digits
  local top = (sign == '-') and '09223372036854775808' or '09223372036854775807'
  if digits > top then return nil end
  local factor = (sign == '-') and -1 or 1
  return factor * tonumber(string.sub(digits, 1, 10)), factor * tonumber(string.sub(digits, 11))
end

-- The sum of two decimal integers, or nil when it has no 64 bits.
local function sum(one_high, one_low, by)
  local by_high, by_low = limbs(by)
  local high, low = one_high + by_high, one_low + by_low
  if low >= 1e10 then high, low = high + 1, low - 1e10 elseif low <= -1e10 then high, low = high - 1, low + 1e10 end
  if high > 0 and low < 0 then high, low = high - 1, low + 1e10 end
  if high < 0 and low > 0 then high, low = high + 1, low - 1e10 end
  local sign = (high < 0 or low < 0) and '-' or ''
  local text = string.gsub(string.format('%010.0f%010.0f', math.abs(high), math.abs(low)), '^0+(%d)', '%1')
  if not limbs(sign .. text) then return nil end
  return sign .. text
end

-- What documents become: laid over what is stored by the settlements of this batch, in order.
local laid, order = {}, {}

local function stands(layer, place, collection, key)
  local one = layer[place] or laid[place]
  if one then return one.value, one.expires end
  local value, _, expires = read_document(collection, key)
  return value, expires
end

-- What the writes of a settlement lead to, or the place of the one that cannot be applied, why, and what is stored.
local function plan(first, writes)
  local layer, list = {}, {}
  for i = 1, writes do
    local from = first + 4 * (i - 1)
    local collection, key, kind, text = ARGV[from], ARGV[from + 1], string.sub(ARGV[from + 2], 1, 1), ARGV[from + 3]
    local place = ttl_entry(collection, key)
    local becomes = { collection = collection, key = key, expires = 0 }
    if kind == 's' then
      local ttl = string.sub(ARGV[from + 2], 2)
      becomes.value = text
      if ttl ~= '' then becomes.expires = now + tonumber(ttl) end
    elseif kind == 'i' then
      local value, expires = stands(layer, place, collection, key)
      if value then
        local high, low = limbs(value)
        if not high then return nil, { i, 'n', value } end
        becomes.value = sum(high, low, text)
        if not becomes.value then return nil, { i, 'o', value } end
        becomes.expires = expires
      else
        becomes.value = text
      end
    end
    layer[place] = becomes
    list[#list + 1] = place
  end
  return layer, list
end

local answers, conflicts, published, unleased = {}, {}, {}, lists()
local rows, records_of = lists(), lists()
allow_when_full()
for i, one in ipairs(ends) do
  local from, sub, seq = one[AT], one[SUB], one[SEQ]
  local d = sub and deliveries[sub][seq]
  if done[i] then
    local list, texts, gone = rows[sub], records_of[sub], unleased[sub]
    local last = #list
    list[last + 1], list[last + 2] = seq, done[i]
    local text = ARGV[from - 1]
    texts[last + 1], texts[last + 2] = seq, pack('<I4', #text + 1) .. '\1' .. text
    gone[#gone + 1] = seq
    count('dx', -1)
    count('x', -1)
    close_event(seq)
    answers[i] = 'c'
  elseif not d or d[STAGE] ~= LEASED or d[TOKEN] ~= one[LEASE] then
    answers[i] = 's'
  else
    local kind, layer, list = one[KIND], {}, {}
    if kind == 'c' and one[IS_MISNAMED] == 1 then
      layer, list = nil, { 0, 'w', '' }
    elseif kind == 'c' then
      layer, list = plan(from, one[WRITES])
    end
    if not layer then
      answers[i] = 'x'
      conflicts[#conflicts + 1] = int(i)
      for _, part in ipairs(list) do
        conflicts[#conflicts + 1] = tostring(part)
      end
    else
      unleased[sub][#unleased[sub] + 1] = seq
      for _, place in ipairs(list) do
        laid[place] = layer[place]
        order[#order + 1] = place
      end
      if one[ATTEMPT] > 0 then record(sub, seq, d, one[ATTEMPT], '\1' .. ARGV[from - 1]) end
      end_claim(sub, seq, d, kind, now + one[DELAY], one[IS_INFRA] == 1)
      local p = progress[seq]
      local as = status(p[1], p[2], p[3])
      answers[i] = (as == 'c' or as == 'f') and as or 'o'
      if kind == 'c' then
        for event = 1, one[PUBLISHED] do
          published[#published + 1] = from + 4 * one[WRITES] + 7 * (event - 1)
        end
      end
    end
  end
end
for sub, list in pairs(unleased) do
  many('ZREM', P .. 'l:' .. sub, list)
end
for sub, list in pairs(rows) do
  many('HSET', P .. 'd:' .. sub, list)
  many('HSET', P .. 'a:' .. sub, records_of[sub])
end
for _, place in ipairs(order) do
  local one = laid[place]
  if one and one.value then
    put_document(one.collection, one.key, one.value, one.expires)
  elseif one then
    remove_document(one.collection, one.key)
  end
  laid[place] = nil
end
store_deliveries()
store_progress()
if #published > 0 then append_events(published, chosen) end
finish(#published > 0)
return { table.concat(answers), conflicts }
