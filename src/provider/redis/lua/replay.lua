-- Delivers events to a subscription: ARGV[4] its name, [5] 1 for those only that it never got, [6] 1 to count only, [7] and
-- [8] the first and last instant at which they were made ('' for any), then their seqs. Answers with how many.

local name, is_missing_only, is_dry, from, to = ARGV[4], ARGV[5] == '1', ARGV[6] == '1', tonumber(ARGV[7]), tonumber(ARGV[8])
local seqs = {}
for at = 9, #ARGV do
  seqs[#seqs + 1] = ARGV[at]
end
local sub = call('HGET', P .. 'subs', name)
if not sub and not is_dry then sub = sub_id(name) end
if sub then load_deliveries(sub, seqs) end
local touched, facts = 0, {}
for i, text in ipairs(fetch(P .. 'ev', seqs)) do
  local seq, event = seqs[i], text and read_event(text)
  if event and (not from or event.created >= from) and (not to or event.created <= to) then
    local d = sub and deliveries[sub][seq]
    local is_meant = not d or (not is_missing_only and d[STAGE] >= DONE)
    if is_meant then touched = touched + 1 end
    if is_meant and not is_dry then
      load_begun(seq, event)
      if d then
        reopen(sub, seq, d, true)
      else
        local key = event.key
        end_sole(seq, event)
        d = { PENDING, 0, is_missing_only and 0 or 1, (key ~= '') and 1 or 0, 0, event.appended, now, 0, 0, 0, 0, 0, 0, 0,
          NO_TOKEN, string.sub(key, 2), '' }
        deliveries[sub][seq], changed[sub][seq] = d, true
        progress[seq][1] = progress[seq][1] + 1
        count('dp', 1)
        if d[KEYED] == 1 then open_key(sub, seq, d[KEY]) end
        line_up(sub, seq, d)
        facts[#facts + 1] = seq
        facts[#facts + 1] = event_text(event.appended, event.created, event.kind, event.id, key,
          event.subs .. pack('<I4', tonumber(sub)))
      end
    end
  end
end
many('HSET', P .. 'ev', facts)
finish()
return touched
