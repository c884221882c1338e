-- Appending, as a part of the scripts that do it: seqs, log entries, facts and deliveries of new events.

-- The lists of subscriptions that events go to: names first, then lists as places among the names. Returns the lists
-- and where the arguments go on.
local function read_lists(at)
  local names, chosen = tonumber(ARGV[at]), {}
  local ids = {}
  for i = 1, names do
    ids[i] = sub_id(ARGV[at + i])
  end
  at = at + names + 1
  local count_of = tonumber(ARGV[at])
  for i = 1, count_of do
    local subs, text = {}, {}
    for place in string.gmatch(ARGV[at + i], '%d+') do
      local id = ids[tonumber(place)]
      subs[#subs + 1] = id
      text[#text + 1] = pack('<I4', tonumber(id))
    end
    chosen[i] = { subs, table.concat(text) }
  end
  return chosen, at + count_of + 1
end

local function new_delivery(appended, due, is_replay, key, is_sole)
  local is_keyed = key ~= ''
  return { PENDING, 0, is_replay, is_keyed and 1 or 0, is_sole and 1 or 0, appended, due, 0, 0, 0, 0, 0, 0, 0, NO_TOKEN,
    is_keyed and string.sub(key, 2) or '', '' }
end

-- The status of an event of the log.
local function stored_status(seq)
  local text = call('HGET', P .. 'pg', seq)
  if text then return status(unpack_from(PROGRESS, text)) end
  text = call('HGET', P .. 'ev', seq)
  local subs = text and subs_of(read_event(text)) or {}
  if #subs ~= 1 then return 'c' end
  load_deliveries(subs[1], { seq })
  local d = deliveries[subs[1]][seq]
  return d and status(sole_progress(d)) or 'c'
end

-- Appends the events whose arguments begin at these places (id, type, instant, key, header, payload, list), and
-- returns for each its seq, whether it was known, and the status of what is stored.
local function append_events(places, chosen)
  local ids, answers = {}, {}
  for i, at in ipairs(places) do
    ids[i] = ARGV[at]
  end
  local known, first, fresh, old = fetch(P .. 'ids', ids), {}, {}, {}
  local head = tonumber(call('HGET', meta, 'head'))
  for i, at in ipairs(places) do
    local id = ids[i]
    if known[i] then
      answers[i] = { known[i], 1 }
      old[#old + 1] = known[i]
    elseif first[id] then
      answers[i] = { first[id][1], 1, first[id][3] }
    else
      head = head + 1
      local state = (#chosen[tonumber(ARGV[at + 6])][1] > 0) and 'p' or 'c'
      answers[i] = { int(head), 0, state }
      first[id] = answers[i]
      fresh[#fresh + 1] = { int(head), at }
    end
  end
  for _, seq in ipairs(old) do
    old[seq] = stored_status(seq)
  end
  for i = 1, #answers do
    answers[i][3] = answers[i][3] or old[answers[i][1]]
  end
  if #fresh == 0 then return answers end
  -- The first write: what a server without memory refuses, so that nothing is half done.
  call('HSET', meta, 'head', int(head))
  local log = P .. 'log'
  local by_id, facts, open, begun, age, kinds, names = {}, {}, {}, {}, {}, lists(), {}
  local rows = lists()
  local plain = {}
  for _, is_sole in ipairs({ true, false }) do
    plain[is_sole] = delivery_text(new_delivery(now, now, 0, '', is_sole))
  end
  for i = 1, #fresh do
    local seq, at = fresh[i][1], fresh[i][2]
    local id, kind, created, key = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
    local list = chosen[tonumber(ARGV[at + 6])]
    call('XADD', log, seq .. '-0', 'id', id, 'type', kind, 'event', ARGV[at + 4], 'payload', ARGV[at + 5])
    by_id[2 * i - 1], by_id[2 * i] = id, seq
    facts[2 * i - 1], facts[2 * i] = seq, event_text(now, tonumber(created), kind, id, key, list[2])
    age[2 * i - 1], age[2 * i] = created, seq
    local own_kind = kinds[kind]
    local last = #own_kind
    if last == 0 then names[#names + 1] = kind end
    own_kind[last + 1], own_kind[last + 2] = seq, seq
    local subs = list[1]
    if #subs > 0 then
      last = #open
      open[last + 1], open[last + 2] = seq, seq
      if #subs > 1 then
        begun[#begun + 1], begun[#begun + 2] = seq, pack(PROGRESS, #subs, 0, 0)
      end
      count('p', 1)
      count('dp', #subs)
    end
    local is_sole = #subs == 1
    local own = (key == '') and plain[is_sole] or delivery_text(new_delivery(now, now, 0, key, is_sole))
    for _, sub in ipairs(subs) do
      local row = rows[sub]
      last = #row
      row[last + 1], row[last + 2] = seq, own
      if key == '' then
        local line = ready[sub]
        last = #line
        line[last + 1], line[last + 2] = seq, seq
      else
        key = string.sub(ARGV[at + 3], 2)
        open_key(sub, seq, key)
        line_up(sub, seq, { [DUE] = now, [KEYED] = 1, [KEY] = key })
        key = ARGV[at + 3]
      end
    end
  end
  many('HSET', P .. 'ids', by_id)
  many('HSET', P .. 'ev', facts)
  -- A small hash would be a list that is gone through for every field; one long value makes it none.
  if #begun > 0 and call('EXISTS', P .. 'pg') == 0 then call('HSET', P .. 'pg', '', string.rep(' ', 65)) end
  many('HSET', P .. 'pg', begun)
  many('ZADD', P .. 'open', open)
  many('ZADD', P .. 'age', age)
  many('SADD', P .. 'types', names)
  for kind, list in pairs(kinds) do
    many('ZADD', P .. 't:' .. kind, list)
  end
  for sub, row in pairs(rows) do
    many('HSET', P .. 'd:' .. sub, row)
  end
  return answers
end
