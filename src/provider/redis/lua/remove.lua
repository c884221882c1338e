-- Taking deliveries and events away, as a part of the scripts that do it.

-- What goes from hashes and sorted sets, by key, and from the log; and the types of what went.
local from_hashes, from_sets, from_log, touched_types = lists(), lists(), {}, {}

local function drop(all, key, member)
  local list = all[P .. key]
  list[#list + 1] = member
end

-- Takes a loaded delivery out of every line, and its record away. The event's list and progress are the caller's.
local function remove_delivery(sub, seq, d)
  if d[STAGE] == PENDING or d[STAGE] == LEASED then
    for _, kind in ipairs({ 'q:', 'b:', 'w:', 'l:' }) do
      call('ZREM', P .. kind .. sub, seq)
    end
    if d[KEYED] == 1 then close_key(sub, seq, d[KEY]) end
    count(d[STAGE] == PENDING and 'dp' or 'dx', -1)
  elseif d[STAGE] == DEAD then
    drop(from_sets, 'dead', seq .. ':' .. sub)
  end
  drop(from_hashes, 'd:' .. sub, seq)
  drop(from_hashes, 'a:' .. sub, seq)
  deliveries[sub][seq], changed[sub][seq] = false, nil
end

-- Reads what removing these events takes, all at once.
local function load_events(seqs, events)
  local wanted = lists()
  for i, seq in ipairs(seqs) do
    for _, sub in ipairs(events[i] and subs_of(events[i]) or {}) do
      wanted[sub][#wanted[sub] + 1] = seq
    end
  end
  for sub, list in pairs(wanted) do
    load_deliveries(sub, list)
  end
end

-- Takes an event's content, facts and deliveries away. Its id is the caller's.
local function remove_event(seq, event)
  local subs = subs_of(event)
  for _, sub in ipairs(subs) do
    load_deliveries(sub, { seq })
  end
  load_progress({ seq }, subs[1])
  local p = progress[seq]
  for _, sub in ipairs(subs) do
    local d = deliveries[sub][seq]
    if d then remove_delivery(sub, seq, d) end
  end
  count(status(p[4], p[5], p[6]), -1)
  progress[seq] = nil
  from_log[#from_log + 1] = seq .. '-0'
  drop(from_hashes, 'ev', seq)
  if not p[7] then drop(from_hashes, 'pg', seq) end
  if p[4] > 0 then drop(from_sets, 'open', seq) end
  drop(from_sets, 'age', seq)
  drop(from_sets, 'late', seq)
  drop(from_sets, 't:' .. event.kind, seq)
  touched_types[event.kind] = true
end

-- Has the server do what was asked for until here.
local function store_removed()
  many('XDEL', P .. 'log', from_log)
  for key, list in pairs(from_hashes) do
    many('HDEL', key, list)
  end
  for key, list in pairs(from_sets) do
    many('ZREM', key, list)
  end
  for kind in pairs(touched_types) do
    if call('EXISTS', P .. 't:' .. kind) == 0 then call('SREM', P .. 'types', kind) end
  end
  from_hashes, from_sets, from_log, touched_types = lists(), lists(), {}, {}
end
